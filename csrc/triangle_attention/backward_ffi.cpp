#include "triangle_attention/backward_sm90.h"
#include "triangle_attention/dtypes.h"

namespace genie {
namespace {

using xla::ffi::F32;
using xla::ffi::PRED;
template <size_t rank>
using Floats = Buffer<F32, rank>;

constexpr char kEnding[] = "ending", kBiasAsZ[] = "bias_as_z", kEpsilon[] = "epsilon";
using Ending = Attr<bool, kEnding>;
using BiasAsZ = Attr<bool, kBiasAsZ>;
using Epsilon = Attr<float, kEpsilon>;

// The sizes that all three read off z and [.., H, D].
struct Sizes {
  int64_t batch, rows, columns, channels, i, j, heads, width, queries, keys_padded;
};
Sizes SizesOf(Dimensions z, Dimensions heads, bool ending, bool bias_as_z) {
  const int64_t i = ending ? z[2] : z[1], j = ending ? z[1] : z[2];
  const int64_t queries = bias_as_z ? z[1] : i, keys = bias_as_z ? z[2] : j;
  const size_t last = heads.size() - 1;
  return {z[0], z[1], z[2], z[3], i, j, heads[last - 1], heads[last], queries, (keys + 7) / 8 * 8};
}

Error OutputBackward(cudaStream_t stream, AnyBuffer o, AnyBuffer z, Optional<PRED, 3> mask,
                     AnyBuffer d_out, Floats<1> norm_scale, Floats<1> norm_bias,
                     AnyBuffer gate_kernel, AnyBuffer out_kernel, Optional<F32, 2> gate_bias,
                     Result<AnyBuffer> d_o, Result<AnyBuffer> d_gate,
                     Result<Floats<4>> out_kernel_sums, Result<Floats<3>> out_bias_sums,
                     Ending ending, Epsilon epsilon) {
  if (z.dimensions().size() != 4 || gate_kernel.dimensions().size() != 3) {
    return Error::InvalidArgument("z must have 4 dimensions and gate_kernel 3");
  }
  const Sizes s = SizesOf(z.dimensions(), gate_kernel.dimensions(), *ending, false);
  const int64_t parts = out_bias_sums->dimensions()[1], hidden = s.heads * s.width;
  for (const Error& error :
       {DtypeStatus(z, {o, d_out, *d_o, *d_gate}, {gate_kernel, out_kernel}),
        ShapeStatus("o, d_o and d_gate", {s.batch, s.i, s.j, s.heads, s.width}, o, *d_o, *d_gate),
        ShapeStatus("mask", {s.batch, s.rows, s.columns}, mask),
        ShapeStatus("d_out", {s.batch, s.rows, s.columns, s.channels}, d_out),
        ShapeStatus("norm_scale and norm_bias", {s.channels}, norm_scale, norm_bias),
        ShapeStatus("gate_kernel", {s.channels, s.heads, s.width}, gate_kernel),
        ShapeStatus("out_kernel", {s.heads, s.width, s.channels}, out_kernel),
        ShapeStatus("gate_bias", {s.heads, s.width}, gate_bias),
        ShapeStatus("out_kernel_sums", {s.batch, parts, hidden, s.channels}, *out_kernel_sums),
        ShapeStatus("out_bias_sums", {s.batch, parts, s.channels}, *out_bias_sums)}) {
    if (error.failure()) return error;
  }
  if (z.element_count() == 0) return Error::Success();
  AttentionOutputBackward p = {};
  p.o = o.untyped_data(), p.z = z.untyped_data(), p.mask = MaskOrNull(mask);
  p.d_out = d_out.untyped_data(), p.d_o = d_o->untyped_data(), p.d_gate = d_gate->untyped_data();
  p.out_kernel_sums = out_kernel_sums->typed_data();
  p.out_bias_sums = out_bias_sums->typed_data();
  p.dtype = FloatOf(z.element_type()), p.kernel_dtype = FloatOf(gate_kernel.element_type());
  p.norm_scale = norm_scale.typed_data(), p.norm_bias = norm_bias.typed_data();
  p.gate_kernel = gate_kernel.untyped_data(), p.out_kernel = out_kernel.untyped_data();
  p.gate_bias = DataOrNull(gate_bias);
  p.batch = s.batch, p.rows = s.rows, p.columns = s.columns, p.parts = parts;
  p.channels = static_cast<int>(s.channels), p.hidden = static_cast<int>(hidden);
  p.ending = *ending, p.epsilon = *epsilon;
  return Launched(p, stream, s.channels, " channels and ", s.heads, " heads of ", s.width);
}

// What the two kernels that take the gradients of all projections have in common.
template <class Backward>
Error FillGradients(Backward& p, const Sizes& s, const AnyBuffer& z, const AnyBuffer (&d)[4],
                    const Floats<4>& d_bias) {
  for (const Error& error :
       {ShapeStatus("gradients of q, k, v and gate", {s.batch, s.i, s.j, s.heads, s.width}, d[0],
                    d[1], d[2], d[3]),
        ShapeStatus("d_bias", {s.batch, s.heads, s.queries, s.keys_padded}, d_bias)}) {
    if (error.failure()) return error;
  }
  p.z = z.untyped_data(), p.d_bias = d_bias.typed_data();
  for (int i = 0; i < 4; ++i) p.d[i] = d[i].untyped_data();
  p.dtype = FloatOf(z.element_type());
  p.batch = s.batch, p.rows = s.rows, p.columns = s.columns;
  p.channels = static_cast<int>(s.channels), p.heads = static_cast<int>(s.heads);
  p.head_width = static_cast<int>(s.width);
  return Error::Success();
}

Error ProjectionBackward(cudaStream_t stream, AnyBuffer z, Optional<PRED, 3> mask, AnyBuffer dq,
                         AnyBuffer dk, AnyBuffer dv, AnyBuffer d_gate, Floats<4> d_bias,
                         AnyBuffer d_out, Floats<1> norm_scale, AnyBuffer q_kernel,
                         AnyBuffer k_kernel, AnyBuffer v_kernel, AnyBuffer gate_kernel,
                         AnyBuffer bias_kernel, Result<AnyBuffer> dz, Result<Floats<4>> statistics,
                         Ending ending, BiasAsZ bias_as_z, Epsilon epsilon) {
  if (z.dimensions().size() != 4 || q_kernel.dimensions().size() != 3) {
    return Error::InvalidArgument("z must have 4 dimensions and q_kernel 3");
  }
  const Sizes s = SizesOf(z.dimensions(), q_kernel.dimensions(), *ending, *bias_as_z);
  const bool residual = d_out.dimensions().size() == 4;
  AttentionProjectionBackward p = {};
  for (const Error& error :
       {DtypeStatus(z, {dq, dk, dv, d_gate, residual ? d_out : z, *dz},
                    {q_kernel, k_kernel, v_kernel, gate_kernel, bias_kernel}),
        ShapeStatus("mask", {s.batch, s.rows, s.columns}, mask),
        ShapeStatus("dz", {s.batch, s.rows, s.columns, s.channels}, *dz),
        ShapeStatus("statistics", {s.batch, s.i, s.j, 2}, *statistics),
        residual ? ShapeStatus("d_out", {s.batch, s.rows, s.columns, s.channels}, d_out)
                 : Error::Success(),
        ShapeStatus("norm_scale", {s.channels}, norm_scale),
        ShapeStatus("the kernels", {s.channels, s.heads, s.width}, q_kernel, k_kernel, v_kernel,
                    gate_kernel),
        ShapeStatus("bias_kernel", {s.channels, s.heads}, bias_kernel),
        FillGradients(p, s, z, {dq, dk, dv, d_gate}, d_bias)}) {
    if (error.failure()) return error;
  }
  if (z.element_count() == 0) return Error::Success();
  p.d_out = residual ? d_out.untyped_data() : nullptr, p.dz = dz->untyped_data();
  p.statistics = reinterpret_cast<float2*>(statistics->typed_data()), p.mask = MaskOrNull(mask);
  p.norm_scale = norm_scale.typed_data(), p.bias_kernel = bias_kernel.untyped_data();
  p.kernel[0] = q_kernel.untyped_data(), p.kernel[1] = k_kernel.untyped_data();
  p.kernel[2] = v_kernel.untyped_data(), p.kernel[3] = gate_kernel.untyped_data();
  p.kernel_dtype = FloatOf(q_kernel.element_type());
  p.ending = *ending, p.bias_as_z = *bias_as_z, p.epsilon = *epsilon;
  return Launched(p, stream, s.channels, " channels and ", s.heads, " heads of ", s.width);
}

Error WeightsBackward(cudaStream_t stream, AnyBuffer z, Floats<4> statistics, AnyBuffer dq,
                      AnyBuffer dk, AnyBuffer dv, AnyBuffer d_gate, Floats<4> d_bias,
                      Result<Floats<5>> kernel_sums, Result<Floats<4>> sums,
                      Result<Floats<4>> bias_kernel_sums, Result<Floats<3>> bias_sums,
                      Ending ending, BiasAsZ bias_as_z) {
  if (z.dimensions().size() != 4 || dq.dimensions().size() != 5) {
    return Error::InvalidArgument("z must have 4 dimensions and dq 5");
  }
  const Sizes s = SizesOf(z.dimensions(), dq.dimensions(), *ending, *bias_as_z);
  const int64_t parts = bias_sums->dimensions()[1], hidden = s.heads * s.width;
  AttentionWeightsBackward p = {};
  for (const Error& error :
       {DtypeStatus(z, {dq, dk, dv, d_gate}, {z}),
        ShapeStatus("statistics", {s.batch, s.i, s.j, 2}, statistics),
        ShapeStatus("kernel_sums", {s.batch, parts, 4, s.channels, hidden}, *kernel_sums),
        ShapeStatus("sums", {s.batch, parts, 4, hidden}, *sums),
        ShapeStatus("bias_kernel_sums", {s.batch, parts, s.channels, 16}, *bias_kernel_sums),
        ShapeStatus("bias_sums", {s.batch, parts, 16}, *bias_sums),
        FillGradients(p, s, z, {dq, dk, dv, d_gate}, d_bias)}) {
    if (error.failure()) return error;
  }
  if (z.element_count() == 0) return Error::Success();
  p.kernel_sums = kernel_sums->typed_data(), p.sums = sums->typed_data();
  p.bias_kernel_sums = bias_kernel_sums->typed_data(), p.bias_sums = bias_sums->typed_data();
  p.statistics = reinterpret_cast<const float2*>(statistics.typed_data());
  p.parts = parts, p.ending = *ending, p.bias_as_z = *bias_as_z;
  return Launched(p, stream, s.channels, " channels and ", s.heads, " heads of ", s.width);
}

const Register<OutputBackward> output("genie_attention_output_bwd");
const Register<ProjectionBackward> projection("genie_attention_project_bwd");
const Register<WeightsBackward> weights("genie_attention_weights_bwd");

}  // namespace
}  // namespace genie
