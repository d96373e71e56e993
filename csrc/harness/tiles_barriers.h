// Barriers: the parity of semaphores, named barriers, and what blocks of a cluster send each other.
#pragma once

#include "harness/tiles.h"

// A fresh semaphore has completed parity 1 and not 0; each completion flips both.
__global__ void Parity(int* seen) {
  __shared__ semaphore s;
  if (threadIdx.x == 0) init_semaphore(s, 2, 0);
  __syncthreads();
  for (int phase = 0; phase < 4; ++phase) {
    if (threadIdx.x == 0) {
      seen[4 * phase] = try_wait(s, phase % 2);
      seen[4 * phase + 1] = try_wait(s, 1 - phase % 2);
      arrive(s);
      seen[4 * phase + 2] = try_wait(s, phase % 2);
    }
    __syncthreads();
    if (threadIdx.x >= 32) warp::arrive(s);
    wait(s, phase % 2);
    if (threadIdx.x == 0) seen[4 * phase + 3] = try_wait(s, phase % 2);
    __syncthreads();
  }
}

// Warpgroup g passes a token round its threads, 8 (g + 1) times, past its own barrier.
__global__ void NamedBarriers(int* seen) {
  __shared__ int token[2][128];
  const int group = warpgroupid(), thread = warpgroup::laneid();
  int mine = thread;
  for (int round = 0; round < 8 * (group + 1); ++round) {
    token[group][thread] = mine;
    warpgroup::sync(group + 1);
    mine = token[group][(thread + 37) % 128];
    warpgroup::sync(group + 1);
  }
  everyone::sync(0);
  seen[threadIdx.x] = mine;
}

// Each block sends every other one a vector a thread, which the receiver reads and acknowledges.
constexpr int kTurns = 3;
__global__ void Exchange(uint4* received, int blocks) {
  constexpr int kBlocks = 4;
  __shared__ uint4 box[kBlocks][128];
  __shared__ semaphore arrived, acknowledged;
  const int rank = cluster_ctarank(), others = blocks - 1;
  if (threadIdx.x == 0) {
    init_semaphore(arrived, 1, 0);
    init_semaphore(acknowledged, others, 0);
  }
  everyone::tma::cluster::sync();
  for (int turn = 0; turn < kTurns; ++turn) {
    if (threadIdx.x == 0) tma::expect_bytes(arrived, others * sizeof(box[0]));
    for (int other = 0; other < blocks; ++other) {
      const uint4 value = {threadIdx.x, unsigned(rank), unsigned(other), unsigned(turn)};
      if (other != rank) genie::StoreRemote(&box[rank][threadIdx.x], other, value, arrived);
    }
    wait(arrived, turn % 2);
    for (int other = 0; other < blocks; ++other) {
      if (other == rank) continue;
      received[((turn * blocks + rank) * blocks + other) * 128 + threadIdx.x] =
          box[other][threadIdx.x];
    }
    __syncthreads();
    for (int other = 0; threadIdx.x == 0 && other < blocks; ++other) {
      if (other != rank) tma::cluster::arrive(acknowledged, other);
    }
    wait(acknowledged, turn % 2);
  }
  everyone::tma::cluster::sync();
}

inline void TestCluster(int blocks) {
  const int size = kTurns * blocks * blocks * 128;
  Array<uint4> received(size);
  cudaLaunchAttribute cluster = {.id = cudaLaunchAttributeClusterDimension};
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  const cudaLaunchConfig_t launch = {
      .gridDim = static_cast<unsigned>(blocks), .blockDim = 128, .attrs = &cluster, .numAttrs = 1};
  Check(cudaLaunchKernelEx(&launch, Exchange, received.data, blocks), "cluster");
  const std::vector<uint4> got = received.Get();
  int64_t wrong = 0;
  for (int i = 0; i < size; ++i) {
    const unsigned other = i / 128 % blocks, rank = i / 128 / blocks % blocks;
    const unsigned turn = i / 128 / blocks / blocks;
    if (other == rank) continue;
    wrong += got[i].x != i % 128u || got[i].y != other || got[i].z != rank || got[i].w != turn;
  }
  Report("cluster of " + std::to_string(blocks) + ": rank, remote stores, remote arrivals", wrong);
}

inline void TestBarriers() {
  Array<int> parities(16), tokens(256);
  Parity<<<1, 64>>>(parities.data);
  Report("semaphore parity and arrival count", parities.Wrong([](int i) { return i % 2; }));
  NamedBarriers<<<1, 256>>>(tokens.data);
  Report("named barriers of warpgroups and of the block",
         tokens.Wrong([](int i) { return (i % 128 + 37 * 8 * (i / 128 + 1)) % 128; }));
  TestCluster(2), TestCluster(4);
}
