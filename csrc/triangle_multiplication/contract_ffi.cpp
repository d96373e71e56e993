#include "ffi.h"
#include "triangle_multiplication/contract_sm90.h"
#include "triangle_multiplication/dtypes.h"

namespace genie {
namespace {

using xla::ffi::PRED;
using xla::ffi::U8;
using Mask = Optional<PRED, 3>;
using LiveResult = Result<Buffer<U8, 1>>;

constexpr char kIncoming[] = "incoming";
using Incoming = Attr<bool, kIncoming>;

// What both handlers read off a and b.
struct Operands {
  int64_t batch = 0, channels = 0;
  Edges edges = {};
  Error error = Error::Success();
};

Operands Read(const AnyBuffer& a, const AnyBuffer& b, bool incoming) {
  if (a.dimensions().size() != 4 || b.dimensions().size() != 4) {
    return {.error = Error::InvalidArgument("a and b must have 4 dimensions")};
  }
  const int64_t batch = a.dimensions()[0], channels = a.dimensions()[1];
  const int summed = incoming ? 2 : 3, kept = incoming ? 3 : 2;
  const int64_t i = a.dimensions()[kept], j = b.dimensions()[kept], k = a.dimensions()[summed];
  Operands operands = {.batch = batch,
                       .channels = channels,
                       .edges = {incoming, a.untyped_data(), b.untyped_data(), i, j, k}};
  operands.error = incoming ? ShapeStatus("b", {batch, channels, k, j}, b)
                            : ShapeStatus("b", {batch, channels, j, k}, b);
  if (b.element_type() != a.element_type()) {
    operands.error = Error::InvalidArgument("a and b must have the same dtype");
  }
  return operands;
}

// Sums up the masks of a and b in `live`, once where they are one.
Error FindLiveBlocks(Operands& operands, const AnyBuffer& a, const AnyBuffer& b, const Mask& a_mask,
                     const Mask& b_mask, LiveResult live, cudaStream_t stream) {
  uint8_t* to = live->typed_data();
  int64_t room = live->element_count();
  const auto summarise = [&](const AnyBuffer& x, const Mask& mask, LiveBlocks* blocks) -> Error {
    if (!mask) return Error::Success();
    const int64_t rows = mask->dimensions()[1], columns = mask->dimensions()[2];
    Error error =
        ShapeStatus("a and b, as their masks round up to multiples of 8,",
                    {mask->dimensions()[0], operands.channels, Padded(rows), Padded(columns)}, x);
    if (error.failure()) return error;
    const int64_t size = LiveSize(operands.batch, rows, columns);
    if (size > room) return Error::InvalidArgument("live is too small for the masks");
    *blocks = to, to += size, room -= size;
    return LaunchStatus(
        FindLive(MaskOrNull(mask), to - size, operands.batch, rows, columns, stream));
  };
  Error error = summarise(a, a_mask, &operands.edges.a_live);
  if (error.failure()) return error;
  if (a_mask && b_mask && a_mask->untyped_data() == b_mask->untyped_data() &&
      a_mask->dimensions() == b_mask->dimensions()) {
    operands.edges.b_live = operands.edges.a_live;
    return Error::Success();
  }
  return summarise(b, b_mask, &operands.edges.b_live);
}

Error ContractForward(cudaStream_t stream, AnyBuffer a, AnyBuffer b, Mask a_mask, Mask b_mask,
                      Result<AnyBuffer> t, LiveResult live, Incoming incoming) {
  Operands operands = Read(a, b, *incoming);
  if (operands.error.failure()) return operands.error;
  const Edges& edges = operands.edges;
  Error error = ShapeStatus("t", {operands.batch, operands.channels, edges.i, edges.j}, *t);
  if (error.failure() || t->element_count() == 0) return error;
  if (error = DeviceStatus(); error.failure()) return error;
  error = FindLiveBlocks(operands, a, b, a_mask, b_mask, live, stream);
  if (error.failure()) return error;
  return Launched<Contraction>({.products = {Forward(edges, t->untyped_data())},
                                .batch = operands.batch,
                                .channels = operands.channels,
                                .dtype = FloatOf(a.element_type()),
                                .out_dtype = FloatOf(t->element_type())},
                               stream, "these shapes and dtypes: rows must be multiples of 8 long");
}

Error ContractBackward(cudaStream_t stream, AnyBuffer a, AnyBuffer b, AnyBuffer dt, Mask a_mask,
                       Mask b_mask, Result<AnyBuffer> da, Result<AnyBuffer> db, LiveResult live,
                       Incoming incoming) {
  Operands operands = Read(a, b, *incoming);
  if (operands.error.failure()) return operands.error;
  const Edges& edges = operands.edges;
  if (dt.element_type() != a.element_type()) {
    return Error::InvalidArgument("dt must have the dtype of a and b");
  }
  for (const Error& error :
       {ShapeStatus("dt", {operands.batch, operands.channels, edges.i, edges.j}, dt),
        ShapeStatus("da",
                    {a.dimensions()[0], a.dimensions()[1], a.dimensions()[2], a.dimensions()[3]},
                    *da),
        ShapeStatus("db",
                    {b.dimensions()[0], b.dimensions()[1], b.dimensions()[2], b.dimensions()[3]},
                    *db)}) {
    if (error.failure()) return error;
  }
  if (da->element_count() == 0 && db->element_count() == 0) return Error::Success();
  if (Error error = DeviceStatus(); error.failure()) return error;
  Error error = FindLiveBlocks(operands, a, b, a_mask, b_mask, live, stream);
  if (error.failure()) return error;
  const void* gradient = dt.untyped_data();
  return Launched<Contraction>({.products = {GradientOfA(edges, gradient, da->untyped_data()),
                                             GradientOfB(edges, gradient, db->untyped_data())},
                                .batch = operands.batch,
                                .channels = operands.channels,
                                .dtype = FloatOf(a.element_type()),
                                .out_dtype = FloatOf(da->element_type())},
                               stream, "these shapes and dtypes: rows must be multiples of 8 long");
}

const Register<ContractForward> forward("genie_contract_fwd");
const Register<ContractBackward> backward("genie_contract_bwd");

}  // namespace
}  // namespace genie
