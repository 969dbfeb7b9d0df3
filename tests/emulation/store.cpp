// Stores a staged tile as each thread: every element of D that belongs to it comes from its place in the panels, whatever rows
// and columns are left of the tile, and nothing else is written.
#include "kernel.h"

namespace {

u16 value(int row, int column) { return static_cast<u16>(row * 256 + column + 1); }

void check(int rows, int columns) {
    constexpr int kPitch = kColumns + 8;
    static u16 panels[kPanels][kPanelSize];
    alignas(16) static u16 d[64 * kPitch];
    std::fill_n(&panels[0][0], kPanels * kPanelSize, u16{0xFFFF});
    std::fill_n(d, 64 * kPitch, u16{0});
    for (int row = 0; row < 64; ++row)
        for (int column = 0; column < kColumns; ++column)
            panels[column / kPanel][panel_offset(row, column % kPanel) / sizeof(u16)] = value(row, column);
    GemmParams p{};
    p.d_row = kPitch;
    for (threadIdx.x = 0; threadIdx.x < 128; ++threadIdx.x) store_staged(p, panels, d, rows, columns);
    for (int row = 0; row < 64; ++row)
        for (int column = 0; column < kPitch; ++column) {
            const u16 wanted = row < rows && column < columns ? value(row, column) : 0;
            if (d[row * kPitch + column] != wanted) fail("another element", row, column);
        }
}

}  // namespace

int main() {
    static_assert(kStaged && !kStoredByTma);
    for (int rows : {-3, 0, 1, 17, 63, 64, 80})
        for (int columns = -8; columns <= kColumns; columns += 8) check(rows, columns);
    printf("ok\n");
}
