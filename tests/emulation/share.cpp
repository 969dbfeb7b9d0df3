// Stores the shares of a split's CTAs as each of their threads: every element of a tile that exists comes from its owner, whatever
// rows and columns are left of the tile and however D's rows lie, and nothing else is written.
#include "kernel.h"

namespace {

constexpr int kRow = 3, kColumn = 16;            // of the tile in D
constexpr int kPitch = kColumn + kTileN + 9;
u16 d[(kRow + kTileM + 1) * kPitch];

int value(int row, int column) { return (row * 7 + column * 3) % 251 + 1; }
u16 bf16(float x) { return static_cast<u16>(pack_bf16(x, 0)); }

void store(const GemmParams& p, int cta, int consumer, int thread) {
    rank_in_cluster = cta * kShare, threadIdx.x = consumer * 128 + thread;
    const Tile tile{0, kRow, kColumn, p.m, 0};
    const int first_column = (kSlices > 1 ? consumer * kConsumerN : 0) + columns_before(cta, consumer);
    float sum[kWaves][kTileN / 2];
    for (int w = 0; w < kWaves; ++w)
        for (int i = 0; i < kTileN / 2; ++i) {
            const int row = first_row_of(consumer) + w * 64 + thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
            sum[w][i] = value(row, first_column + i / 4 * 8 + thread % 4 * 2 + i % 2);
        }
    const Place place = place_of(p, tile, cta, consumer);
    if (place.zero() != 0) fail("another phase", cta, thread);
    store_share(p, sum, place);
}

void check(int rows, int columns, int pitch, int offset) {
    std::fill_n(d, sizeof d / sizeof d[0], u16{0});
    GemmParams p{};
    p.m = rows, p.n = kColumn + columns, p.d_row = pitch, p.d_data = d + offset;
    for (int cta = 0; cta < kSplit; ++cta)
        for (int consumer = 0; consumer < kConsumers; ++consumer)
            for (int thread = 0; thread < 128; ++thread) store(p, cta, consumer, thread);
    for (int i = 0; i < static_cast<int>(sizeof d / sizeof d[0]) - offset; ++i) {
        const int row = i / pitch - kRow, column = i % pitch - kColumn;
        const bool exists = row >= 0 && row < min(rows, kTileM) && column >= 0 && column < min(columns, kTileN);
        if (d[offset + i] != (exists ? bf16(value(row, column)) : 0)) fail("another element", row, column);
    }
}

}  // namespace

int main() {
    for (int rows : {1, 9, kTileM - 1, kTileM, kTileM + 100})
        for (int columns : {1, 7, 8, kTileN / 2, kTileN - 3, kTileN, kTileN + 100})
            for (int pitch : {kPitch - 1, kPitch})
                for (int offset : {0, 1}) check(rows, columns, pitch, offset);
    printf("ok\n");
}
