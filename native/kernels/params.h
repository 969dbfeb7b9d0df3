// What a launch passes to the kernels. Included by the kernels (NVRTC) and by the host library (g++): one definition.
#pragma once

namespace fp8gemm {

struct alignas(64) TensorMap {                   // CUtensorMap: opaque, 128 bytes, 64-byte aligned
    unsigned char bytes[128];
};

enum Kind { kDense = 0, kContiguous = 1, kRagged = 2, kMasked = 3 };

// Division by a number that the host knows: x / d = x * multiplier >> shift, for x < 2^31 (Granlund and Montgomery, Division
// by Invariant Integers using Multiplication, 1994).
struct Divisor {
    unsigned multiplier, shift;
};

// One GEMM: D[g][m, n] = sum over kb of sa[m, kb] * sb[n / 128, kb] * (A[m, kb] . B[n, kb]). All strides in elements.
// A line of 64 bytes that a warp reads of these for the first time costs it 100 to 250 cycles: what the first load needs
// is one line, what the first scales need another.
struct GemmParams {
    int m, k;                                    // m: rows of one group for masked, of all of A otherwise
    int columns, tiles, clusters;                // cluster tiles along N; of all of D (not ragged, masked); who walks over them
    int raster;                                  // rows of cluster tiles walked together before the next column band
    Divisor by_raster, by_last, by_band;         // by_last: by the rows of the last band; by_band: by the tiles of a whole one
    unsigned short a_box_rows;                   // of A that a CTA loads: fewer than a tile where A is shorter
    unsigned short pace;                         // cycles a stage, of a CTA's first (deep) ones, from where B is first asked for
    unsigned char sa_by_bulk;                    // A's scales have rows fastest, columns 16 bytes aligned
    unsigned char sa_in_pieces, sb_in_pieces;    // each deep stage's scales of a row lie in one piece, and there are whole stages
    unsigned long long b_policy;                 // L2 cache policy of the weight stream (createpolicy encoding)
    // a, b: (k, row, 1, group), of deep stages (128, row, k / 128, group): one box has several blocks.
    // d: (n, row, 1, group), blocked (panel, row, n / panel, group).
    TensorMap a, b, d;
    const float *sa, *sb;
    long long sa_row, sa_k, sa_group, sb_row, sb_k, sb_group;
    unsigned short* d_data;                      // bf16
    long long d_row, d_group;
    int d_staged;                                // D goes through shared memory: base, strides, N and the plan suit it
    int d_blocked;                               // a box of D holds all panels of a tile: N is whole panels
    int n, groups;
    const int* layout;                           // m_indices, group_ends or masked_m, on the device; null if dense
    const unsigned char *a_data, *b_data;        // e4m3; the GEMM kernel reads them by the maps
    long long a_row, a_group, b_row, b_group;
};

inline Divisor divisor(unsigned d) {
    unsigned bits = 0;
    while (1ull << bits < d) ++bits;
    return {static_cast<unsigned>(((1ull << (31 + bits)) + d - 1) / d), 31 + bits};
}

// Cluster tiles in rows and columns (ragged and masked rows are not known here), and how many clusters walk over them. More
// than can be numbered are one band.
inline void set_tiles(GemmParams& p, int rows, int columns, int raster, int clusters) {
    auto number = [](long long tiles) { return static_cast<int>(tiles < 0x7FFFFFFF ? tiles : 0x7FFFFFFF); };
    raster = raster > 1 ? raster : 1;
    p.columns = columns, p.tiles = number(1ll * rows * columns), p.clusters = clusters;
    p.raster = raster, p.by_raster = divisor(raster), p.by_band = divisor(number(1ll * raster * columns));
    p.by_last = rows % raster ? divisor(rows % raster) : p.by_raster;
}

// Columns of D that lie together in shared memory, a panel: 64 or 32, swizzled, or where these don't fit all of a tile's. Its
// rows then start in four places of the banks, which does without swizzling; panels of 16 would take TMA much longer.
constexpr int panel_columns(int columns) { return columns % 64 == 0 ? 64 : columns % 32 == 0 ? 32 : columns; }

// One quantisation: x (rows, columns) -> q e4m3, s FP32. Strides in elements.
struct CastParams {
    const void* x;
    unsigned char* q;
    float* s;
    long long rows, columns, x_row, q_row, s_row, s_k;
};

// A change of layout of scales: s[g][i, j] = x[g][i, j].
struct CopyParams {
    const float* x;
    float* s;
    long long rows, x_row, x_k, x_group, s_row, s_k, s_group;
};

}  // namespace fp8gemm
