// Which rows of A's scales a tile takes where its group begins at any row: never one behind A, and all that it needs.
#include "kernel.h"

int main() {
    static_assert(kKind == kRagged && kBulkScales);
    GemmParams p{};
    Tile tile{};
    for (p.sa_by_bulk = 0; p.sa_by_bulk < 2; ++p.sa_by_bulk)
        for (p.m = 1; p.m < 3 * kTileM; ++p.m)
            for (tile.row = 0; tile.row < p.m; ++tile.row) {
                const ScaleRows r = scale_rows(p, tile);
                if (r.lead != (p.sa_by_bulk ? tile.row % 4 : 0)) fail("another lead", p.m, tile.row);
                if (r.first != tile.row - r.lead) fail("another beginning", p.m, tile.row);
                if (!p.sa_by_bulk) continue;
                const int end = r.first + r.bulk + r.rest;
                if (r.first % 4 || r.bulk % 4) fail("no multiples of 16 bytes", p.m, tile.row);
                if (r.rest < 0 || r.rest > 3) fail("more than are copied apart", p.m, tile.row);
                if (end > p.m) fail("behind A", p.m, tile.row);
                if (end < min(tile.row + kTileM, p.m)) fail("rows without a scale", p.m, tile.row);
                if (r.bulk + r.rest > kScalesOfB) fail("over B's scales", p.m, tile.row);
            }
    printf("ok\n");
}
