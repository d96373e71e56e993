// Matrix products: WGMMA of every width and form that the kernels use, and a warp's own.
#pragma once

#include "harness/tiles.h"

// Which factors are stored transposed: A as [K, 64], B as [N, K]. Registers hold A as it is.
enum class Form { kAB, kABt, kAtB, kAtBt, kRegistersB, kRegistersBt };
constexpr const char* kFormNames[] = {
    "AB", "ABt", "AtB", "AtBt", "AB, A registers", "ABt, A registers"};
constexpr bool kTransposesA(Form form) { return form == Form::kAtB || form == Form::kAtBt; }
constexpr bool kTransposesB(Form form) {
  return form == Form::kABt || form == Form::kAtBt || form == Form::kRegistersBt;
}

// d = A B, then d += A B: the first overwrites what d held.
template <typename T, Form form, int N, int K, int bytes>
__global__ void Multiply(float* out) {
  constexpr bool a_turned = kTransposesA(form), b_turned = kTransposesB(form);
  using A = std::conditional_t<a_turned, st<T, K, 64>, st<T, 64, K>>;
  using B = std::conditional_t<b_turned, st<T, N, K, true, bytes>, st<T, K, N, true, bytes>>;
  extern __shared__ alignment_dummy __shm[];
  shared_allocator allocator(reinterpret_cast<int*>(&__shm[0]));
  auto& a = allocator.template allocate<A>();
  auto& b = allocator.template allocate<B>();
  for (int i = threadIdx.x; i < 64 * K; i += 128) {
    const int row = i / K, k = i % K;
    a[a_turned ? int2{k, row} : int2{row, k}] = Round<T>(Draw(1, i));
  }
  for (int i = threadIdx.x; i < N * K; i += 128) {
    const int column = i / K, k = i % K;
    b[b_turned ? int2{column, k} : int2{k, column}] = Round<T>(Draw(2, i));
  }
  genie::FenceAsyncProxy();
  warpgroup::sync(1);
  rt_fl<16, N> d;
  ForEach(d, [](int, int, float& x) { x = 1.f; });
  rt<T, 16, K> fragment;
  if constexpr (form == Form::kRegistersB || form == Form::kRegistersBt) {
    warpgroup::load(fragment, a);
  }
  if constexpr (form == Form::kAB) warpgroup::mm_AB(d, a, b), warpgroup::mma_AB(d, a, b);
  if constexpr (form == Form::kABt) warpgroup::mm_ABt(d, a, b), warpgroup::mma_ABt(d, a, b);
  if constexpr (form == Form::kAtB) warpgroup::mm_AtB(d, a, b), warpgroup::mma_AtB(d, a, b);
  if constexpr (form == Form::kAtBt) warpgroup::mm_AtBt(d, a, b), warpgroup::mma_AtBt(d, a, b);
  if constexpr (form == Form::kRegistersB) {
    warpgroup::mm_AB(d, fragment, b), warpgroup::mma_AB(d, fragment, b);
  }
  if constexpr (form == Form::kRegistersBt) {
    warpgroup::mm_ABt(d, fragment, b), warpgroup::mma_ABt(d, fragment, b);
  }
  warpgroup::mma_async_wait();
  genie::Pin(d);
  const int first = 16 * warpgroup::warpid();
  ForEach(d, [&](int r, int c, float& x) { out[(first + r) * N + c] = x; });
}

template <typename T>
double DrawnProduct(int row, int column, int depth) {
  double sum = 0;
  for (int k = 0; k < depth; ++k) {
    sum += double{Widen(Round<T>(Draw(1, row * depth + k)))} *
           Widen(Round<T>(Draw(2, column * depth + k)));
  }
  return sum;
}

template <typename T, Form form, int N, int K = 64, int bytes = 0>
void TestMultiply() {
  constexpr int kShared = (64 + N) * K * sizeof(T) + 2048;
  const auto kernel = Multiply<T, form, N, K, bytes>;
  Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared), "size");
  Array<float> out(64 * N);
  kernel<<<1, 128, kShared>>>(out.data);
  using B =
      std::conditional_t<kTransposesB(form), st<T, N, K, true, bytes>, st<T, K, N, true, bytes>>;
  Report(std::string("WGMMA ") + Name<T>() + " N=" + std::to_string(N) + " K=" + std::to_string(K) +
             " " + kFormNames[static_cast<int>(form)] + ", swizzle of B " +
             std::to_string(B::swizzle_bytes),
         out.Wrong([](int i) { return float(2 * DrawnProduct<T>(i / N, i % N, K)); }, 2e-3f));
}

// One step of a warp: D = A B + C, B column layout.
template <typename T>
__global__ void MultiplyStep(float* out) {
  rt<T, 16, 16> a;
  rt<T, 16, 16, col_l> b;
  rt_fl<16, 16> d;
  ForEach(a, [](int r, int c, T& x) { x = Round<T>(Draw(1, r * 16 + c)); });
  ForEach(b, [](int r, int c, T& x) { x = Round<T>(Draw(2, c * 16 + r)); });
  ForEach(d, [](int r, int c, float& x) { x = r - c; });
  const auto& left = reinterpret_cast<const uint32_t (&)[4]>(a.tiles[0][0].data);
  const auto& right = reinterpret_cast<const uint32_t (&)[4]>(b.tiles[0][0].data);
  auto& to = d.tiles[0][0].data;
  kittens::detail::mma_step<T>(to[0], to[1], left, right[0], right[2], to[0], to[1]);
  kittens::detail::mma_step<T>(to[2], to[3], left, right[1], right[3], to[2], to[3]);
  ForEach(d, [&](int r, int c, float& x) { out[r * 16 + c] = x; });
}

template <typename T, int N>
void TestWidth() {
  TestMultiply<T, Form::kAB, N>(), TestMultiply<T, Form::kABt, N>();
  TestMultiply<T, Form::kAtB, N>(), TestMultiply<T, Form::kAtBt, N>();
  TestMultiply<T, Form::kRegistersB, N>(), TestMultiply<T, Form::kRegistersBt, N>();
}

template <typename T>
void TestProducts() {
  TestWidth<T, 16>(), TestWidth<T, 32>(), TestWidth<T, 64>();
  TestWidth<T, 128>(), TestWidth<T, 192>(), TestWidth<T, 256>();
  // Other depths, and the swizzles that go with narrow tiles.
  TestMultiply<T, Form::kABt, 64, 128>(), TestMultiply<T, Form::kRegistersB, 64, 256>();
  TestMultiply<T, Form::kABt, 64, 32>(), TestMultiply<T, Form::kAB, 64, 32>();
  TestMultiply<T, Form::kABt, 128, 16>(), TestMultiply<T, Form::kRegistersB, 64, 16>();
  TestMultiply<T, Form::kABt, 64, 64, 32>(), TestMultiply<T, Form::kABt, 64, 64, 64>();
  TestMultiply<T, Form::kAB, 64, 64, 32>(), TestMultiply<T, Form::kAB, 128, 64, 64>();
  TestMultiply<T, Form::kAtB, 128, 64, 64>(), TestMultiply<T, Form::kAtBt, 64, 128>();
  Array<float> out(256);
  MultiplyStep<T><<<1, 32>>>(out.data);
  Report(
      std::string("mma.sync step ") + Name<T>(),
      out.Wrong([](int i) { return float(DrawnProduct<T>(i / 16, i % 16, 16) + i / 16 - i % 16); },
                1e-3f));
}
