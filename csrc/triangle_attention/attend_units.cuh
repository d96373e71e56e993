// How the queries of the attention core are cut into units of work.
#pragma once

#include <cstdint>

namespace genie::attend {

// Every line (3 rows and a head) has the same tiles of queries, the last pair of which may lack its
// second. Units are `kTiles` tiles while every block gets one, then pairs, then single tiles, so
// that no block works long while others have nothing left.
template <int kTiles>
struct Units {
  static constexpr int kPairs = kTiles / 2;
  struct Place {
    int line, first, tiles;  // the first tile may lie beyond the last
  };

  int whole, pairs;               // units of either kind; the rest are single tiles
  int all_whole, whole_per_line;  // units, had none been cut
  int query_tiles;                // of a line

  // How many units there are, which must be below 2^30; fills in the rest.
  int64_t Cut(int64_t lines, int64_t tiles, int64_t blocks) {
    const int64_t line_pairs = (tiles + 1) / 2, line_wholes = line_pairs / kPairs;
    const int64_t wholes = lines * line_wholes, uncut = wholes / blocks * blocks;
    const int64_t rest = (wholes - uncut) * kPairs + lines * (line_pairs % kPairs);
    int64_t in_pairs = rest / blocks * blocks;
    if (2 * (rest - in_pairs) > blocks || tiles == 1) in_pairs = rest;
    whole = static_cast<int>(uncut), pairs = static_cast<int>(in_pairs);
    all_whole = static_cast<int>(wholes), whole_per_line = static_cast<int>(line_wholes);
    query_tiles = static_cast<int>(tiles);
    return uncut + in_pairs + 2 * (rest - in_pairs);
  }

  __device__ Place operator[](int n) const {
    int size = kTiles, first = 0, of = n, line;  // `of` is the whole unit that n was cut from
    if (n >= whole) {
      int pair = n - whole;
      size = 2;
      if (pair >= pairs) size = 1, first = (pair - pairs) % 2, pair = pairs + (pair - pairs) / 2;
      of = whole + pair / kPairs;
      first += of < all_whole ? pair % kPairs * 2 : 0;
      line = pair - (all_whole - whole) * kPairs;  // of pairs that no whole unit takes
    }
    if (of < all_whole) line = of / whole_per_line;
    first += (of < all_whole ? of - line * whole_per_line : whole_per_line) * kTiles;
    return {line, first, max(1, min(size, query_tiles - first))};
  }
};

}  // namespace genie::attend
