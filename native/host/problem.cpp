// Checks the operands of a call and describes the problem: the one place that says what a legal call is.
#include <cinttypes>
#include <cstdio>

#include "dlpack.h"
#include "error.h"

using namespace fp8gemm;
using Tensor = fp8gemm_tensor;

namespace {

constexpr int64_t kBlock = 128;                  // of K, and of N for the scales of B
int64_t blocks(int64_t x) { return (x + kBlock - 1) / kBlock; }

struct Text { char s[96]; };
Text shape_text(int ndim, const int64_t* shape) {
    Text t{};
    int at = snprintf(t.s, sizeof t.s, "(");
    for (int i = 0; i < ndim; ++i)
        at += snprintf(t.s + at, sizeof t.s - at, "%" PRId64 "%s", shape[i], i + 1 < ndim ? ", " : ndim == 1 ? "," : "");
    snprintf(t.s + at, sizeof t.s - at, ")");
    return t;
}

enum class Type { e4m3, bf16, f32, i32 };
struct TypeRule { int code, bits; int raw_bits; const char* text; };     // raw_bits: the unsigned integer taken for it
constexpr TypeRule kTypes[] = {
    {dlpack::kE4M3FN, 8, 8, "float8_e4m3fn (or uint8 holding its bits)"},
    {dlpack::kBfloat, 16, 16, "bfloat16 (or uint16 holding its bits)"},
    {dlpack::kFloat, 32, 0, "float32"},
    {dlpack::kInt, 32, 0, "int32"},
};

int check_type(const Tensor& t, const char* name, Type type) {
    const TypeRule& rule = kTypes[static_cast<int>(type)];
    const bool exact = t.dtype_code == rule.code && t.dtype_bits == rule.bits;
    const bool raw = t.dtype_code == dlpack::kUInt && t.dtype_bits == rule.raw_bits;
    if (t.dtype_lanes == 1 && (exact || raw)) return FP8GEMM_OK;
    return fail(FP8GEMM_DTYPE, name, "dtype %s, expected %s", fp8gemm_type_name(&t), rule.text);
}

int check_shape(const Tensor& t, const char* name, int ndim, const int64_t* expected, const char* meaning) {
    bool same = t.ndim == ndim;
    for (int i = 0; same && i < ndim; ++i) same = t.shape[i] == expected[i];
    if (same) return FP8GEMM_OK;
    return fail(FP8GEMM_SHAPE, name, "shape %s, expected %s = %s", shape_text(t.ndim, t.shape).s,
                shape_text(ndim, expected).s, meaning);
}

// Strides of dimensions of 1 carry no meaning: give them one that passes every check, TMA's multiples included.
void compact_ones(Tensor& t) {
    for (int i = t.ndim - 1; i >= 0; --i)
        if (t.shape[i] == 1) t.stride[i] = i == t.ndim - 1 ? 1 : (t.shape[i + 1] * t.stride[i + 1] + 15) / 16 * 16;
}

// Its strides and address carry no meaning; NumPy makes them 0.
bool is_empty(const Tensor& t) {
    for (int i = 0; i < t.ndim; ++i)
        if (t.shape[i] == 0) return true;
    return false;
}

int check_strides(const Tensor& t, const char* name, bool inner_contiguous, int alignment) {
    if (is_empty(t)) return FP8GEMM_OK;
    for (int i = 0; i < t.ndim; ++i)
        if (t.stride[i] < 0 || t.stride[i] > INT64_C(1) << 40)
            return fail(FP8GEMM_LAYOUT, name, "stride %" PRId64 " of dimension %d, allowed are 0 to 2^40", t.stride[i], i);
    __int128 extent = 0;                         // so that no sum below overflows
    for (int i = 0; i < t.ndim; ++i) extent += static_cast<__int128>(t.shape[i] - 1) * t.stride[i];
    if (extent >= INT64_C(1) << 48)
        return fail(FP8GEMM_LAYOUT, name, "its strides reach over 2^48 elements or more");
    if (inner_contiguous && t.shape[t.ndim - 1] > 1 && t.stride[t.ndim - 1] != 1)
        return fail(FP8GEMM_LAYOUT, name, "stride %" PRId64 " of the last dimension, which must be contiguous (stride 1)",
                    t.stride[t.ndim - 1]);
    if (reinterpret_cast<uintptr_t>(t.data) % alignment)
        return fail(FP8GEMM_LAYOUT, name, "address %p, must be a multiple of %d bytes", t.data, alignment);
    return FP8GEMM_OK;
}

int check_output(const Tensor& d) {
    if (d.read_only) return fail(FP8GEMM_LAYOUT, "d", "read-only; it is written");
    if (is_empty(d)) return FP8GEMM_OK;
    for (int i = 0; i < d.ndim; ++i) {
        int64_t extent = 0;                      // of the dimensions with smaller strides: a step must lead over it
        for (int j = 0; j < d.ndim; ++j)
            if (j != i && d.stride[j] <= d.stride[i]) extent += (d.shape[j] - 1) * d.stride[j];
        if (d.shape[i] > 1 && d.stride[i] <= extent)
            return fail(FP8GEMM_LAYOUT, "d", "stride %" PRId64 " of dimension %d makes elements overlap; the least is %"
                        PRId64, d.stride[i], i, extent + 1);
    }
    return FP8GEMM_OK;
}

// Whether two strided tensors can share a byte. Exact for rows side by side in one buffer, else by their extents.
bool overlap(const Tensor& x, const Tensor& y) {
    if (is_empty(x) || is_empty(y)) return false;
    struct Range { uintptr_t first; int64_t bytes, row, row_bytes; } r[2];
    const Tensor* both[] = {&x, &y};
    for (int t = 0; t < 2; ++t) {
        const Tensor& v = *both[t];
        const int64_t size = v.dtype_bits / 8;
        r[t] = {reinterpret_cast<uintptr_t>(v.data), size, v.ndim > 1 ? v.stride[v.ndim - 2] * size : 0,
                ((v.shape[v.ndim - 1] - 1) * v.stride[v.ndim - 1] + 1) * size};
        for (int i = 0; i < v.ndim; ++i) r[t].bytes += (v.shape[i] - 1) * v.stride[i] * size;
    }
    const Range &p = r[0].first <= r[1].first ? r[0] : r[1], &q = &p == &r[0] ? r[1] : r[0];
    const uintptr_t gap = q.first - p.first;
    if (gap >= static_cast<uintptr_t>(p.bytes)) return false;
    if (x.ndim == 2 && y.ndim == 2 && p.row == q.row && p.row > 0) {
        const int64_t offset = static_cast<int64_t>(gap % p.row);        // q's rows begin here inside p's rows
        return offset < p.row_bytes || offset + q.row_bytes > p.row;
    }
    return true;
}

bool suits_tma(const Tensor& t) {
    const int64_t size = t.dtype_bits / 8;
    if (reinterpret_cast<uintptr_t>(t.data) % 16) return false;
    for (int i = 0; i + 1 < t.ndim; ++i)
        if (t.stride[i] * size % 16 || t.stride[i] == 0 || t.stride[i] * size >= INT64_C(1) << 40) return false;
    return true;
}

// Scales of A with rows fastest; base, columns and groups 16 bytes aligned. (A single row's do not count as such.)
bool suits_bulk_copies(const Tensor& sa) {
    const int row = sa.ndim - 2;
    if (reinterpret_cast<uintptr_t>(sa.data) % 16 || sa.stride[row] != 1) return false;
    for (int i = 0; i < sa.ndim; ++i)
        if (i != row && sa.shape[i] > 1 && sa.stride[i] % 4) return false;
    return true;
}

struct Named { Tensor* tensor; const char* name; };

int check_devices(const Named* all, int count) {
    const Tensor& a = *all[0].tensor;
    for (int i = 1; i < count; ++i) {
        const Tensor& t = *all[i].tensor;
        if (t.device_type == a.device_type && t.device_id == a.device_id) continue;
        auto kind = [](const Tensor& x) { return x.device_type == dlpack::kCPU ? "cpu" : "cuda"; };
        return fail(FP8GEMM_DEVICE, all[i].name, "on %s:%d, but a is on %s:%d; all operands must be on one device",
                    kind(t), t.device_id, kind(a), a.device_id);
    }
    return FP8GEMM_OK;
}

const char* layout_name(int kind) {
    return kind == FP8GEMM_CONTIGUOUS ? "m_indices" : kind == FP8GEMM_RAGGED ? "group_ends" : "masked_m";
}

// Ranks and shapes; fills the sizes of the problem.
int check_sizes(const fp8gemm_operands& o, fp8gemm_problem& p) {
    const bool grouped = o.kind != FP8GEMM_DENSE, masked = o.kind == FP8GEMM_MASKED;
    const int rank_a = masked ? 3 : 2, rank_b = grouped ? 3 : 2;
    if (o.a.ndim != rank_a)
        return fail(FP8GEMM_SHAPE, "a", "shape %s, expected rank %d = %s", shape_text(o.a.ndim, o.a.shape).s, rank_a,
                    masked ? "(G, Mmax, K)" : "(M, K)");
    if (o.b.ndim != rank_b)
        return fail(FP8GEMM_SHAPE, "b", "shape %s, expected rank %d = %s", shape_text(o.b.ndim, o.b.shape).s, rank_b,
                    grouped ? "(G, N, K)" : "(N, K)");
    const int64_t m = o.a.shape[rank_a - 2], k = o.a.shape[rank_a - 1], n = o.b.shape[rank_b - 2];
    const int64_t g = grouped ? o.b.shape[0] : 1, kb = blocks(k), nb = blocks(n);
    if (k % 16) return fail(FP8GEMM_SHAPE, "a", "K = %" PRId64 ", must be a multiple of 16", k);
    if (n < 1) return fail(FP8GEMM_SHAPE, "b", "N = %" PRId64 ", must be at least 1", n);
    if (g < 1) return fail(FP8GEMM_SHAPE, "b", "G = %" PRId64 ", must be at least 1", g);
    if (o.b.shape[rank_b - 1] != k)
        return fail(FP8GEMM_SHAPE, "b", "K = %" PRId64 ", but a has K = %" PRId64, o.b.shape[rank_b - 1], k);
    if (masked && o.a.shape[0] != g)
        return fail(FP8GEMM_SHAPE, "a", "G = %" PRId64 ", but b has G = %" PRId64, o.a.shape[0], g);
    // Kernels count rows in whole tiles of each group, columns in pairs of tiles, in 32 bits.
    constexpr int64_t kMost = (INT64_C(1) << 31) - 512, kTile = 256;
    const int64_t rows_in_tiles = masked ? g * (m + kTile) : grouped ? m + g * kTile : m;
    if (rows_in_tiles > kMost)
        return fail(FP8GEMM_SHAPE, "a", "M = %" PRId64 ", G = %" PRId64 "; rows, with each group's in whole tiles of %" PRId64
                    ", must be at most %" PRId64, m, g, kTile, kMost);
    if (n > kMost) return fail(FP8GEMM_SHAPE, "b", "N = %" PRId64 ", must be at most %" PRId64, n, kMost);
    p.m = static_cast<int32_t>(m), p.n = static_cast<int32_t>(n), p.k = static_cast<int32_t>(k);
    p.groups = static_cast<int32_t>(g);

    const int64_t sa[] = {g, m, kb}, sb[] = {g, nb, kb}, d[] = {g, m, n}, rows[] = {m}, counts[] = {g};
    FP8GEMM_TRY(check_shape(o.sa, "sa", rank_a, masked ? sa : sa + 1,
                            masked ? "(G, Mmax, ceil(K / 128))" : "(M, ceil(K / 128))"));
    FP8GEMM_TRY(check_shape(o.sb, "sb", rank_b, grouped ? sb : sb + 1,
                            grouped ? "(G, ceil(N / 128), ceil(K / 128))" : "(ceil(N / 128), ceil(K / 128))"));
    if (o.d.ndim >= 0)
        FP8GEMM_TRY(check_shape(o.d, "d", rank_a, masked ? d : d + 1, masked ? "(G, Mmax, N)" : "(M, N)"));
    if (grouped) {
        const bool per_row = o.kind == FP8GEMM_CONTIGUOUS;
        FP8GEMM_TRY(check_shape(o.layout, layout_name(o.kind), 1, per_row ? rows : counts, per_row ? "(M,)" : "(G,)"));
    }
    return FP8GEMM_OK;
}

}  // namespace

int fp8gemm_describe(fp8gemm_operands* o, fp8gemm_problem* p) {
    *p = {};
    p->kind = o->kind;
    const bool grouped = o->kind != FP8GEMM_DENSE, given = o->d.ndim >= 0;

    FP8GEMM_TRY(check_type(o->a, "a", Type::e4m3));
    FP8GEMM_TRY(check_type(o->sa, "sa", Type::f32));
    FP8GEMM_TRY(check_type(o->b, "b", Type::e4m3));
    FP8GEMM_TRY(check_type(o->sb, "sb", Type::f32));
    if (given) FP8GEMM_TRY(check_type(o->d, "d", Type::bf16));
    if (grouped) FP8GEMM_TRY(check_type(o->layout, layout_name(o->kind), Type::i32));

    FP8GEMM_TRY(check_sizes(*o, *p));

    Named all[6] = {{&o->a, "a"}, {&o->sa, "sa"}, {&o->b, "b"}, {&o->sb, "sb"}};
    int count = 4;
    if (grouped) all[count++] = {&o->layout, layout_name(o->kind)};
    if (given) all[count++] = {&o->d, "d"};
    FP8GEMM_TRY(check_devices(all, count));
    p->device_type = o->a.device_type, p->device_id = o->a.device_id;

    for (int i = 0; i < count; ++i) compact_ones(*all[i].tensor);
    FP8GEMM_TRY(check_strides(o->a, "a", true, 1));
    FP8GEMM_TRY(check_strides(o->sa, "sa", false, 4));
    FP8GEMM_TRY(check_strides(o->b, "b", true, 1));
    FP8GEMM_TRY(check_strides(o->sb, "sb", false, 4));
    if (grouped) FP8GEMM_TRY(check_strides(o->layout, layout_name(o->kind), true, 4));
    if (given) {
        FP8GEMM_TRY(check_strides(o->d, "d", true, 2));
        FP8GEMM_TRY(check_output(o->d));
        for (int i = 0; i + 1 < count; ++i)
            if (overlap(o->d, *all[i].tensor))
                return fail(FP8GEMM_LAYOUT, "d", "overlaps %s in memory; the output must be apart from every input",
                            all[i].name);
    }
    p->inputs_by_tma = suits_tma(o->a) && suits_tma(o->b);
    p->scales_by_bulk = suits_bulk_copies(o->sa);
    // TMA clips at 16 bytes: it would write past a row whose end is not a multiple of them.
    p->output_by_tma = p->n % 8 == 0 && (!given || suits_tma(o->d));
    return FP8GEMM_OK;
}
