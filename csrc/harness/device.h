// What harnesses do on the device: memory, draws and time.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "harness/check.h"

template <typename T>
__global__ void FillDraws(T* to, int64_t size, uint32_t seed, float scale, float offset) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    to[i] = Round<T>(offset + scale * Draw(seed, i));
  }
}

// Device memory that is freed with its owner.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  ~Memory() {
    for (void* p : allocations_) cudaFree(p);
  }
  template <typename P>
  void Allocate(P** to, int64_t bytes) {
    Check(cudaMalloc(reinterpret_cast<void**>(to), std::max<int64_t>(bytes, 16)), "cudaMalloc");
    allocations_.push_back(*to);
  }
  template <typename P>
  static std::vector<P> ToHost(const P* from, int64_t size) {
    std::vector<P> to(size);
    Check(cudaMemcpy(to.data(), from, size * sizeof(P), cudaMemcpyDeviceToHost), "to host");
    return to;
  }

 private:
  std::vector<void*> allocations_;
};

// Calls recorded in a stream, to be launched at once, so that the host's time does not show.
class Graph {
 public:
  Graph(cudaStream_t stream, const std::function<void()>& record) : stream_(stream) {
    Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
    record();
    Check(cudaStreamEndCapture(stream, &graph_), "capture");
    Check(cudaGraphInstantiate(&calls_, graph_), "graph");
  }
  Graph(const Graph&) = delete;
  ~Graph() {
    cudaGraphExecDestroy(calls_);
    cudaGraphDestroy(graph_);
  }
  void Launch() const { Check(cudaGraphLaunch(calls_, stream_), "calls"); }

 private:
  cudaStream_t stream_;
  cudaGraph_t graph_;
  cudaGraphExec_t calls_;
};

// Median milliseconds of call(i), i counting the calls of a sample.
inline float MedianTime(const std::function<void(int)>& call, int repeats = 15, int calls = 8,
                        cudaStream_t stream = nullptr) {
  cudaEvent_t start, stop;
  cudaEventCreate(&start);
  cudaEventCreate(&stop);
  std::vector<float> times;
  for (int r = -3; r < repeats; ++r) {
    cudaEventRecord(start, stream);
    for (int i = 0; i < calls; ++i) call(i);
    cudaEventRecord(stop, stream);
    Check(cudaEventSynchronize(stop), "time");
    float milliseconds;
    cudaEventElapsedTime(&milliseconds, start, stop);
    if (r >= 0) times.push_back(milliseconds / calls);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  std::sort(times.begin(), times.end());
  return times[repeats / 2];
}
