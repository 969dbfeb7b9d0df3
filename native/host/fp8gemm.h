/* The C interface of libfp8gemm.so. Plain C types; every function that can fail returns an fp8gemm_status, with the
 * details in fp8gemm_last_error() of the same thread. No exception crosses it and nothing is initialised on loading.
 *
 * The ABI version counts changes of any struct or function below; fp8gemm/native.py refuses another one. */
#ifndef FP8GEMM_H
#define FP8GEMM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FP8GEMM_ABI_VERSION 5
#define FP8GEMM_API __attribute__((visibility("default")))

typedef enum {
    FP8GEMM_OK = 0,
    FP8GEMM_DTYPE = 1,          /* an operand has the wrong element type */
    FP8GEMM_SHAPE = 2,          /* ... rank or shape */
    FP8GEMM_LAYOUT = 3,         /* ... strides, alignment, read-only, overlap */
    FP8GEMM_DEVICE = 4,         /* ... device */
    FP8GEMM_UNAVAILABLE = 5,    /* no driver, or a GPU that can't run it */
    FP8GEMM_DRIVER = 6,         /* a CUDA driver call failed */
    FP8GEMM_ARGUMENT = 7,       /* any other bad argument */
    FP8GEMM_NOT_PREPARED = 8    /* would have to load or allocate during a stream capture */
} fp8gemm_status;

typedef struct {
    int32_t status;
    char argument[32];          /* the operand at fault, or "" */
    char message[480];
} fp8gemm_error;

/* ---- tensors: DLPack's DLTensor with the byte offset applied and strides filled in ----------------------------- */
typedef struct {
    void *data;
    int32_t device_type, device_id;             /* DLDeviceType; host kinds become 1 (CPU), CUDA and managed 2 (CUDA) */
    int32_t dtype_code, dtype_bits, dtype_lanes;
    int32_t ndim;                               /* 0 .. 3; -1: no tensor given */
    int32_t read_only;
    int64_t shape[3], stride[3];                /* in elements */
} fp8gemm_tensor;

/* ---- problems ----------------------------------------------------------------------------------------------------- */
typedef enum { FP8GEMM_DENSE = 0, FP8GEMM_CONTIGUOUS = 1, FP8GEMM_RAGGED = 2, FP8GEMM_MASKED = 3 } fp8gemm_kind;

typedef struct {                                /* one call's tensors; layout: m_indices, group_ends or masked_m */
    int32_t kind;
    fp8gemm_tensor a, sa, b, sb, d, layout;     /* d.ndim == -1: to be allocated */
} fp8gemm_operands;

typedef struct {                                /* what a plan is chosen for: no pointers */
    int32_t kind;
    int32_t device_type, device_id;
    int32_t m, n, k, groups;                    /* m: rows of A (masked: of one group); groups: of B, 1 if dense */
    int32_t inputs_by_tma;                      /* strides and alignment of a and b suit TMA */
    int32_t output_by_tma;                      /* ... of d */
    int32_t scales_by_bulk;                     /* ... of sa suit bulk copies: rows fastest in memory */
} fp8gemm_problem;

/* ---- plans ---------------------------------------------------------------------------------------------------------- */
typedef struct {
    int32_t tile_m, tile_n, stages, cluster_m, cluster_n, depth, split, slices, swap_ab, one_tile;  /* compiled */
    int32_t shared_bytes, threads;                              /* follow from them; a launch asks for 116 KB at least */
    int32_t num_sms, raster;                                    /* launch */
    uint64_t b_policy;
} fp8gemm_plan;

typedef struct {
    int32_t threads, tile_n;
} fp8gemm_cpu_plan;

/* ---- devices ---------------------------------------------------------------------------------------------------------- */
typedef struct {
    char name[96];
    int32_t major, minor, sms, l2_bytes, shared_bytes, clock_khz;
    double memory_bandwidth;                                    /* bytes per second; 0 if the driver does not tell */
} fp8gemm_device;

typedef struct fp8gemm_kernel fp8gemm_kernel;   /* a loaded kernel, for the life of the process */
typedef struct fp8gemm_buffer fp8gemm_buffer;   /* memory of ours, counted */

/* ---- the table of plans ------------------------------------------------------------------------------------------ */
typedef struct {                                /* what a call is looked up by; zero where it makes no difference */
    int32_t kind;
    int32_t device_type, device_id;
    int32_t reference;                          /* only the reference kernel can run it; all below is then zero */
    int32_t m, n, k, groups;                    /* m: a bucket */
    int32_t expected_m;                         /* rows of a group that the caller expects, a bucket; 0: no guess */
    int32_t row_scales;                         /* A's scales don't suit bulk copies */
    int32_t num_sms;                            /* the limit in force; 0: none */
    int32_t batch_invariant;
} fp8gemm_key;

typedef struct {                                /* what its calls do */
    fp8gemm_key key;
    const fp8gemm_kernel *kernel;               /* null on the CPU */
    fp8gemm_plan plan;                          /* CUDA; zeros for the reference kernel */
    fp8gemm_cpu_plan cpu_plan;                  /* CPU */
    int32_t from_store;                         /* 0: the cost model's */
} fp8gemm_entry;

FP8GEMM_API int fp8gemm_abi_version(void);
FP8GEMM_API const fp8gemm_error *fp8gemm_last_error(void);

/* DLPack. A capsule that is read stays unconsumed: dropping it runs its producer's deleter. `api` is the
 * DLPackExchangeAPI of the object's type. The GIL must be held for all that take or give Python objects. */
FP8GEMM_API int fp8gemm_read_capsule(void *py_capsule, const char *argument, fp8gemm_tensor *tensor);
FP8GEMM_API const void *fp8gemm_exchange_api(void *py_object);                   /* null: it has none */
FP8GEMM_API int fp8gemm_read_exchange(const void *api, void *py_object, const char *argument, fp8gemm_tensor *tensor);
FP8GEMM_API const char *fp8gemm_type_name(const fp8gemm_tensor *tensor);         /* good until this thread asks again */
FP8GEMM_API int fp8gemm_exchange_stream(const void *api, int device_type, int device_id, void **stream);

/* Memory for d=None, exported with a reference of its own. `stream` may write it, then says so with `written`; others
 * `await` that before they read. No stream is used after the call that names it. The last reference frees the memory once
 * it is written and the default stream, if that awaited it, is done with it. */
FP8GEMM_API int fp8gemm_buffer_new(int device_type, int device_id, size_t bytes, void *stream, fp8gemm_buffer **buffer);
FP8GEMM_API void *fp8gemm_buffer_data(const fp8gemm_buffer *buffer);
FP8GEMM_API int fp8gemm_buffer_written(fp8gemm_buffer *buffer, void *stream);
FP8GEMM_API int fp8gemm_buffer_await(fp8gemm_buffer *buffer, void *stream);
FP8GEMM_API void fp8gemm_buffer_release(fp8gemm_buffer *buffer);
FP8GEMM_API void *fp8gemm_buffer_export(fp8gemm_buffer *buffer, const fp8gemm_tensor *tensor, int versioned);
FP8GEMM_API void fp8gemm_dlpack_delete(void *managed, int versioned);
FP8GEMM_API void fp8gemm_capsule_delete(void *py_capsule);      /* a PyCapsule destructor */

/* Checks every operand and describes the problem. Where strides[i] belongs to a dimension of 1, it is made compact. */
FP8GEMM_API int fp8gemm_describe(fp8gemm_operands *operands, fp8gemm_problem *problem);

/* Any thread may call these at any time. A found entry never changes and lives as long as the process. */
FP8GEMM_API int32_t fp8gemm_bucket(int64_t m);                  /* rows for which one plan serves */
FP8GEMM_API void fp8gemm_make_key(const fp8gemm_problem *problem, int64_t expected_m,
                                  int batch_invariant /* 0, 1, or -1: as set */, fp8gemm_key *key);
FP8GEMM_API void fp8gemm_set_batch_invariant(int on);           /* for all calls that do not say */
FP8GEMM_API int fp8gemm_batch_invariant(void);
FP8GEMM_API const fp8gemm_entry *fp8gemm_find(const fp8gemm_key *key);           /* null: a miss; else counts a call */
/* Replaces what its key had, but for a plan from the store that one from elsewhere would replace. */
FP8GEMM_API int fp8gemm_put(const fp8gemm_entry *entry);
/* Copies entries with their calls since the last listing, which starts the count anew; returns how many there are. */
FP8GEMM_API size_t fp8gemm_entries(fp8gemm_entry *entries, uint64_t *calls, size_t capacity);
FP8GEMM_API void fp8gemm_forget_plans(void);                    /* every problem is a miss again */
FP8GEMM_API int fp8gemm_limit_sms(int device_id, int num_sms);  /* 0: no limit */
FP8GEMM_API int fp8gemm_sm_limit(int device_id);
/* What an entry says: on the CPU now, on CUDA on the stream. */
FP8GEMM_API int fp8gemm_run(const fp8gemm_entry *entry, const fp8gemm_operands *operands,
                            const fp8gemm_problem *problem, void *stream);

/* A new builtin: the call's fast path (call.cpp), which hands what it can't do to the Python function `otherwise`. */
FP8GEMM_API void *fp8gemm_python_call(void *otherwise);

/* The driver is opened by the first of these. A process that was forked after that gets FP8GEMM_UNAVAILABLE. */
FP8GEMM_API int fp8gemm_check_fork(void);                       /* says only that */
FP8GEMM_API int fp8gemm_driver_version(int *version);
FP8GEMM_API int fp8gemm_device_count(int *count);
FP8GEMM_API int fp8gemm_device_read(int device_id, fp8gemm_device *device);
/* A capture on another stream or thread goes on undisturbed. */
FP8GEMM_API int fp8gemm_kernel_load(int device_id, const void *cubin, size_t bytes, const char *name, int shared_bytes,
                                    fp8gemm_kernel **kernel);
/* FP8GEMM_NOT_PREPARED if the stream (null: none) is being captured: a call on it must not load. */
FP8GEMM_API int fp8gemm_require_no_capture(int device_id, void *stream);

/* Launches. Streams are CUstream; capture-safe; nothing synchronises or allocates. K = 0 is for the reference kernel only. */
FP8GEMM_API int fp8gemm_launch_gemm(const fp8gemm_kernel *kernel, const fp8gemm_operands *operands,
                                    const fp8gemm_problem *problem, const fp8gemm_plan *plan, void *stream);
FP8GEMM_API int fp8gemm_launch_reference(const fp8gemm_kernel *kernel, const fp8gemm_operands *operands,
                                         const fp8gemm_problem *problem, void *stream);
FP8GEMM_API int fp8gemm_launch_cast(const fp8gemm_kernel *kernel, int per_block, const fp8gemm_tensor *x,
                                    const fp8gemm_tensor *q, const fp8gemm_tensor *s, void *stream);
/* s = x, both float32 of one shape and any strides: a change of layout. */
FP8GEMM_API int fp8gemm_launch_copy(const fp8gemm_kernel *kernel, const fp8gemm_tensor *x, const fp8gemm_tensor *s,
                                    void *stream);
/* Waits for the stream, then copies to host memory: only `validate=True` does that. */
FP8GEMM_API int fp8gemm_copy_to_host(int device_id, void *stream, const void *from, size_t bytes, void *to);

/* Streams and events: what ordering with other frameworks' streams needs. */
FP8GEMM_API int fp8gemm_stream_wait(int device_id, void *stream, void *other);   /* stream waits for other's work so far */
FP8GEMM_API int fp8gemm_stream_capturing(int device_id, void *stream, int *capturing);
FP8GEMM_API int fp8gemm_event_record(int device_id, void *stream, void **event);
FP8GEMM_API int fp8gemm_event_done(int device_id, void *event, int *done);       /* destroys the event once it has passed */

/* CPU backend. */
FP8GEMM_API int fp8gemm_cpu_gemm(const fp8gemm_operands *operands, const fp8gemm_problem *problem,
                                 const fp8gemm_cpu_plan *plan);
FP8GEMM_API int fp8gemm_cpu_cast(int per_block, const fp8gemm_tensor *x, const fp8gemm_tensor *q,
                                 const fp8gemm_tensor *s, int threads);
FP8GEMM_API int fp8gemm_cpu_copy(const fp8gemm_tensor *x, const fp8gemm_tensor *s);
FP8GEMM_API const char *fp8gemm_cpu_features(void);

#ifdef __cplusplus
}
#endif
#endif
