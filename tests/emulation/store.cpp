// Stores a staged tile as each thread: every element of D that belongs to it comes from its place in the panels, whatever rows
// and columns are left of the tile, and nothing else is written.
#include "kernel.h"

namespace {

u16 value(int row, int column) { return static_cast<u16>(row * 256 + column + 1); }

constexpr int kRow = 3, kColumn = 16, kFirstRow = 64;            // of the tile in D, of the consumer in the tile

void check(int rows, int columns) {
    constexpr int kPitch = kColumn + kColumns + 8, kRows = kRow + kFirstRow + 64;
    static u16 panels[kPanels][kPanelSize];
    alignas(16) static u16 d[kRows * kPitch];
    std::fill_n(&panels[0][0], kPanels * kPanelSize, u16{0xFFFF});
    std::fill_n(d, kRows * kPitch, u16{0});
    for (int row = 0; row < 64; ++row)
        for (int column = 0; column < kColumns; ++column)
            panels[column / kPanel][panel_offset(row, column % kPanel) / sizeof(u16)] = value(row, column);
    GemmParams p{};
    p.d_row = kPitch, p.d_data = d, p.n = kColumn + columns;
    const Tile tile{0, kRow, kColumn, kFirstRow + rows, 0};
    for (threadIdx.x = 0; threadIdx.x < 128; ++threadIdx.x) store_staged(p, panels, tile, kFirstRow);
    for (int i = 0; i < kRows * kPitch; ++i) {
        const int row = i / kPitch - kRow - kFirstRow, column = i % kPitch - kColumn;
        const bool own = row >= 0 && row < rows && column >= 0 && column < min(columns, kColumns);
        if (d[i] != (own ? value(row, column) : 0)) fail("another element", row, column);
    }
}

}  // namespace

int main() {
    static_assert(kStaged && !kStoredByTma);
    for (int rows : {-3, 0, 1, 17, 63, 64, 80})
        for (int columns = -8; columns <= kColumns; columns += 8) check(rows, columns);
    printf("ok\n");
}
