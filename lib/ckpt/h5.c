/* The only file that sees hdf5.h. Every public function quietens the library, does its work through small steps that
 * return HDF5's ids or -1 (closing -1 does nothing), and turns a failure into a moec_err with the innermost message. */
#include "ckpt/h5.h"

#include "base/file.h"
#include "base/mem.h"
#include "ckpt/h5_front.h"

#include <errno.h>
#include <fcntl.h>
#include <hdf5.h>
#if H5_VERSION_GE(1, 13, 0)
#include <H5FDdevelop.h>
#endif
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct moec_h5 {
    hid_t file;
    hid_t driver;     /* writing: must outlive the file, which uses it to the end without a hold on it */
    char *name;       /* of the file, for errors */
    bool writing;
    int errnum;       /* writing: of the first system call that failed */
    uint64_t left;    /* reading: stored bytes that arrays may still claim; starts at the file's length */
};

enum {
    CHUNK_READ = 64 << 20, /* bytes of a chunk that we read, at most */
    LEVEL = 4,             /* of deflate */
    EXPANSION = 1100,      /* deflate makes at most 1032 bytes of one */
    SLACK = 4096
};

/* On disk always little-endian, in memory as the machine has it. */
typedef struct type_row { hid_t disk, memory; } type_row;

static bool type_of(type_row *out, moec_dtype d)
{
    switch (d) {
    case MOEC_F64: *out = (type_row){H5T_IEEE_F64LE, H5T_NATIVE_DOUBLE}; return true;
    case MOEC_F32: *out = (type_row){H5T_IEEE_F32LE, H5T_NATIVE_FLOAT}; return true;
    case MOEC_I64: *out = (type_row){H5T_STD_I64LE, H5T_NATIVE_INT64}; return true;
    case MOEC_I32: *out = (type_row){H5T_STD_I32LE, H5T_NATIVE_INT32}; return true;
    case MOEC_U64: *out = (type_row){H5T_STD_U64LE, H5T_NATIVE_UINT64}; return true;
    case MOEC_U8: *out = (type_row){H5T_STD_U8LE, H5T_NATIVE_UINT8}; return true;
    case MOEC_U32: *out = (type_row){H5T_STD_U32LE, H5T_NATIVE_UINT32}; return true;
    default: return false; /* the others are not written by anyone */
    }
}

/* ---- errors ------------------------------------------------------------------------------------------------------- */

/* The library prints on its own unless told not to, once for each thread. */
static void quiet(void)
{
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
}

typedef struct cause {
    int errnum;
    char text[200]; /* "": none yet */
} cause;

/* Called from the innermost record outwards. Its text holds "errno = N" where a system call failed. */
static herr_t on_record(unsigned n, const H5E_error2_t *e, void *data)
{
    cause *c = data;
    (void)n;
    if (!e->desc)
        return 0;
    const char *at = strstr(e->desc, "errno = ");
    if (at && c->errnum == 0)
        c->errnum = (int)strtol(at + strlen("errno = "), NULL, 10);
    if (!c->text[0])
        snprintf(c->text, sizeof c->text, "%s", e->desc);
    return 0;
}

/* `what` failed at `path` in the file; a failing system call takes precedence over `code`. */
static moec_status lib_fail(const moec_h5 *h, moec_status code, const char *path, const char *what, moec_err *err)
{
    cause c = {.errnum = h->errnum};
    char where[400];
    H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, on_record, &c);
    H5Eclear2(H5E_DEFAULT);
    snprintf(where, sizeof where, "%.300s%s%.80s", h->name, *path ? ": " : "", path);
    if (c.errnum == ENOMEM)
        return moec_fail(err, MOEC_ENOMEM, "%s: out of memory", where);
    if (c.errnum > 0)
        return moec_fail_errno(err, c.errnum, where);
    return moec_fail(err, code, "%s: %s (HDF5: %s)", where, what, c.text[0] ? c.text : "no reason given");
}

static moec_status bad(const moec_h5 *h, const char *path, const char *name, const char *what, moec_err *err)
{
    return moec_fail(err, MOEC_EFORMAT, "%s: %s%s%s: %s", h->name, path, name ? " attribute " : "", name ? name : "", what);
}

/* ---- the file driver for writing ----------------------------------------------------------------------------------
 *
 * HDF5 1.10 does not survive a disk that fills up: after a write that failed it can neither close the file nor end the
 * process in order (it crashes at exit). So the library writes through a driver of ours to which every write succeeds: the
 * first failure is kept in the handle, the rest is dropped, and whoever called is told. */

typedef struct sink {
    H5FD_t pub; /* the library's part, which must be first */
    moec_h5 *owner;
    int fd;
    haddr_t eoa, eof;
} sink;

typedef struct sink_access { moec_h5 *owner; } sink_access;

static H5FD_t *sink_open(const char *name, unsigned flags, hid_t access, haddr_t max)
{
    const sink_access *info = H5Pget_driver_info(access);
    sink *f;
    (void)flags, (void)max;
    if (!info || MOEC_NEW(f, 1, NULL) != MOEC_OK) {
        if (info)
            info->owner->errnum = ENOMEM;
        return NULL;
    }
    f->owner = info->owner;
    f->fd = open(name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (f->fd >= 0)
        return &f->pub;
    f->owner->errnum = errno;
    moec_free(f);
    return NULL;
}

static herr_t sink_close(H5FD_t *file)
{
    sink *f = (sink *)file;
    if (close(f->fd) != 0 && f->owner->errnum == 0)
        f->owner->errnum = errno;
    moec_free(f);
    return 0;
}

static herr_t sink_query(const H5FD_t *file, unsigned long *flags)
{
    (void)file;
    *flags = H5FD_FEAT_AGGREGATE_METADATA | H5FD_FEAT_ACCUMULATE_METADATA | H5FD_FEAT_DATA_SIEVE |
             H5FD_FEAT_AGGREGATE_SMALLDATA;
    return 0;
}

static haddr_t sink_get_eoa(const H5FD_t *file, H5FD_mem_t type)
{
    (void)type;
    return ((const sink *)file)->eoa;
}

static herr_t sink_set_eoa(H5FD_t *file, H5FD_mem_t type, haddr_t at)
{
    (void)type;
    ((sink *)file)->eoa = at;
    return 0;
}

static haddr_t sink_get_eof(const H5FD_t *file, H5FD_mem_t type)
{
    (void)type;
    return ((const sink *)file)->eof;
}

/* The library seldom reads while it writes; what is not there reads as zeros. */
static herr_t sink_read(H5FD_t *file, H5FD_mem_t type, hid_t transfer, haddr_t at, size_t size, void *to)
{
    (void)type, (void)transfer;
    moec__h5_bytes_get(to, ((const sink *)file)->fd, at, size);
    return 0;
}

static herr_t sink_write(H5FD_t *file, H5FD_mem_t type, hid_t transfer, haddr_t at, size_t size, const void *from)
{
    sink *f = (sink *)file;
    (void)type, (void)transfer;
    if (f->owner->errnum == 0)
        f->owner->errnum = moec__h5_bytes_put(f->fd, at, from, size);
    f->eof = at + size > f->eof ? at + size : f->eof;
    return 0;
}

static herr_t sink_truncate(H5FD_t *file, hid_t transfer, hbool_t closing)
{
    sink *f = (sink *)file;
    (void)transfer, (void)closing;
    if (f->eof != f->eoa && f->owner->errnum == 0 && ftruncate(f->fd, (off_t)f->eoa) != 0)
        f->owner->errnum = errno;
    f->eof = f->eoa;
    return 0;
}

static const H5FD_class_t sink_class = {
#if H5_VERSION_GE(1, 13, 0)
    .version = H5FD_CLASS_VERSION,
    .value = (H5FD_class_value_t)H5_VFD_RESERVED + 87, /* of those that are free for programs' own use */
#endif
    .name = "moecompress",
    .maxaddr = (haddr_t)INT64_MAX,
    .fc_degree = H5F_CLOSE_STRONG,
    .fapl_size = sizeof(sink_access),
    .open = sink_open,
    .close = sink_close,
    .query = sink_query,
    .get_eoa = sink_get_eoa,
    .set_eoa = sink_set_eoa,
    .get_eof = sink_get_eof,
    .read = sink_read,
    .write = sink_write,
    .truncate = sink_truncate,
    .fl_map = H5FD_FLMAP_DICHOTOMY,
};

/* ---- files -------------------------------------------------------------------------------------------------------- */

static moec_status new_handle(moec_h5 **out, const char *name, moec_err *err)
{
    moec_status st = MOEC_NEW(*out, 1, err);
    if (st != MOEC_OK)
        return st;
    (*out)->file = (*out)->driver = -1;
    st = moec_copy(&(*out)->name, name, strlen(name), err);
    if (st != MOEC_OK) {
        moec_free(*out);
        *out = NULL;
    }
    quiet();
    return st;
}

static void drop_handle(moec_h5 **h)
{
    if ((*h)->driver >= 0)
        H5FDunregister((*h)->driver);
    moec_free((*h)->name);
    moec_free(*h);
    *h = NULL;
}

/* Access that closes everything with the file and takes no lock: files appear by renaming, and some file systems of
 * clusters know no locks. */
static hid_t access_list(void)
{
    hid_t p = H5Pcreate(H5P_FILE_ACCESS);
    if (p >= 0 && H5Pset_fclose_degree(p, H5F_CLOSE_STRONG) >= 0 && H5Pset_file_locking(p, false, true) >= 0 &&
        H5Pset_libver_bounds(p, H5F_LIBVER_V110, H5F_LIBVER_V110) >= 0)
        return p;
    H5Pclose(p);
    return -1;
}

moec_status moec_h5_create(moec_h5 **out, const char *path, moec_err *err)
{
    moec_status st = new_handle(out, path, err);
    if (st != MOEC_OK)
        return st;
    (*out)->writing = true;
    const sink_access info = {*out};
    hid_t create = H5Pcreate(H5P_FILE_CREATE), access = access_list(), driver = H5FDregister(&sink_class);
    (*out)->driver = driver;
    if (create >= 0 && access >= 0 && driver >= 0 && H5Pset_userblock(create, MOEC_H5_FRONT) >= 0 &&
        H5Pset_obj_track_times(create, false) >= 0 &&
        H5Pset_link_creation_order(create, H5P_CRT_ORDER_TRACKED | H5P_CRT_ORDER_INDEXED) >= 0 &&
        H5Pset_driver(access, driver, &info) >= 0)
        (*out)->file = H5Fcreate(path, H5F_ACC_TRUNC, create, access);
    if ((*out)->file < 0)
        st = lib_fail(*out, MOEC_EIO, "", "cannot be made", err);
    H5Pclose(access);
    H5Pclose(create);
    if (st != MOEC_OK)
        drop_handle(out);
    return st;
}

moec_status moec_h5_open(moec_h5 **out, const char *path, moec_err *err)
{
    uint64_t size;
    *out = NULL;
    moec_status st = moec__h5_front_read(&size, path, err);
    if (st == MOEC_OK)
        st = new_handle(out, path, err);
    if (st != MOEC_OK)
        return st;
    (*out)->left = size;
    hid_t access = access_list();
    if (access >= 0)
        (*out)->file = H5Fopen(path, H5F_ACC_RDONLY, access);
    if ((*out)->file < 0) {
        st = lib_fail(*out, MOEC_EFORMAT, "", "not an HDF5 file", err);
        drop_handle(out);
    }
    H5Pclose(access);
    return st;
}

moec_status moec_h5_open_image(moec_h5 **out, const void *bytes, size_t len, const char *what, moec_err *err)
{
    *out = NULL;
    moec_status st = moec__h5_front_check(bytes, len, what, err);
    if (st == MOEC_OK)
        st = new_handle(out, what, err);
    if (st != MOEC_OK)
        return st;
    (*out)->left = len;
    hid_t access = access_list();
    /* The library copies the bytes; its parameter is not const. */
    if (access >= 0 && H5Pset_fapl_core(access, 1 << 20, false) >= 0 && H5Pset_file_image(access, (void *)(uintptr_t)bytes, len) >= 0)
        (*out)->file = H5Fopen(what, H5F_ACC_RDONLY, access);
    if ((*out)->file < 0) {
        st = lib_fail(*out, MOEC_EFORMAT, "", "not an HDF5 file", err);
        drop_handle(out);
    }
    H5Pclose(access);
    return st;
}

moec_status moec_h5_close(moec_h5 *h, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (!h)
        return MOEC_OK;
    quiet();
    if (H5Fclose(h->file) < 0 || h->errnum != 0)
        st = lib_fail(h, MOEC_EIO, "", h->writing ? "cannot be written" : "cannot be closed", err);
    drop_handle(&h);
    return st;
}

/* ---- writing ------------------------------------------------------------------------------------------------------ */

moec_status moec_h5_group(moec_h5 *h, const char *path, moec_err *err)
{
    moec_status st = MOEC_OK;
    quiet();
    hid_t make = H5Pcreate(H5P_GROUP_CREATE), g = -1;
    if (make >= 0 && H5Pset_obj_track_times(make, false) >= 0 &&
        H5Pset_link_creation_order(make, H5P_CRT_ORDER_TRACKED | H5P_CRT_ORDER_INDEXED) >= 0)
        g = H5Gcreate2(h->file, path, H5P_DEFAULT, make, H5P_DEFAULT);
    if (g < 0 || H5Gclose(g) < 0 || h->errnum != 0)
        st = lib_fail(h, MOEC_EIO, path, "group cannot be made", err);
    H5Pclose(make);
    return st;
}

static hid_t array_layout(int rank, const int64_t *dim, size_t cell, bool packed)
{
    unsigned long long chunk[MOEC_MAX_RANK];
    hid_t p = H5Pcreate(H5P_DATASET_CREATE);
    bool good = p >= 0 && H5Pset_obj_track_times(p, false) >= 0;
    if (good && rank > 0 && packed) {
        moec__h5_chunk(chunk, rank, dim, cell);
        good = H5Pset_chunk(p, rank, chunk) >= 0 && H5Pset_shuffle(p) >= 0 && H5Pset_deflate(p, LEVEL) >= 0;
    }
    if (good)
        return p;
    H5Pclose(p);
    return -1;
}

static hid_t space_of(int rank, const int64_t *dim)
{
    hsize_t extent[MOEC_MAX_RANK];
    for (int i = 0; i < rank; i++)
        extent[i] = (hsize_t)dim[i];
    return rank == 0 ? H5Screate(H5S_SCALAR) : H5Screate_simple(rank, extent, NULL);
}

static moec_status put_array(moec_h5 *h, const char *path, moec_dtype dtype, int rank, const int64_t *dim, bool packed,
                             const void *values, moec_err *err)
{
    moec_status st = MOEC_OK;
    type_row type;
    quiet();
    if (rank < 0 || rank > MOEC_MAX_RANK || !type_of(&type, dtype))
        return moec_fail(err, MOEC_EINVAL, "%s: rank %d of %s cannot be written", path, rank, moec_dtypes[dtype].name);
    hid_t space = space_of(rank, dim), d = -1;
    hid_t layout = array_layout(rank, dim, (size_t)moec_dtypes[dtype].bytes, packed);
    if (space >= 0 && layout >= 0)
        d = H5Dcreate2(h->file, path, type.disk, space, H5P_DEFAULT, layout, H5P_DEFAULT);
    if (d < 0 || H5Dwrite(d, type.memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, values) < 0)
        st = lib_fail(h, MOEC_EIO, path, "cannot be written", err);
    if (d >= 0 && (H5Dclose(d) < 0 || h->errnum != 0) && st == MOEC_OK)
        st = lib_fail(h, MOEC_EIO, path, "cannot be written", err);
    H5Pclose(layout);
    H5Sclose(space);
    return st;
}

moec_status moec_h5_put_array(moec_h5 *h, const char *path, moec_dtype dtype, int rank, const int64_t *dim, const void *values, moec_err *err)
{
    return put_array(h, path, dtype, rank, dim, true, values, err);
}

moec_status moec_h5_put_plain(moec_h5 *h, const char *path, moec_dtype dtype, int rank, const int64_t *dim, const void *values, moec_err *err)
{
    return put_array(h, path, dtype, rank, dim, false, values, err);
}

static moec_status put_attribute(moec_h5 *h, const char *path, const char *name, hid_t disk, hid_t memory, int64_t n,
                                 const void *values, moec_err *err)
{
    moec_status st = MOEC_OK;
    quiet();
    hid_t space = space_of(n < 0 ? 0 : 1, &n), o = H5Oopen(h->file, path, H5P_DEFAULT), a = -1;
    if (space >= 0 && o >= 0)
        a = H5Acreate2(o, name, disk, space, H5P_DEFAULT, H5P_DEFAULT);
    if (a < 0 || H5Awrite(a, memory, values) < 0)
        st = lib_fail(h, MOEC_EIO, path, name, err);
    if (a >= 0 && (H5Aclose(a) < 0 || h->errnum != 0) && st == MOEC_OK)
        st = lib_fail(h, MOEC_EIO, path, name, err);
    H5Oclose(o);
    H5Sclose(space);
    return st;
}

moec_status moec_h5_put_int(moec_h5 *h, const char *path, const char *name, int64_t v, moec_err *err)
{
    return put_attribute(h, path, name, H5T_STD_I64LE, H5T_NATIVE_INT64, -1, &v, err);
}

moec_status moec_h5_put_ints(moec_h5 *h, const char *path, const char *name, const int64_t *v, int64_t n, moec_err *err)
{
    return put_attribute(h, path, name, H5T_STD_I64LE, H5T_NATIVE_INT64, n, v, err);
}

moec_status moec_h5_put_real(moec_h5 *h, const char *path, const char *name, double v, moec_err *err)
{
    return put_attribute(h, path, name, H5T_IEEE_F64LE, H5T_NATIVE_DOUBLE, -1, &v, err);
}

/* Fixed length, so that a reader knows it before it reads. */
static hid_t text_type(size_t bytes)
{
    hid_t t = H5Tcopy(H5T_C_S1);
    if (t >= 0 && H5Tset_size(t, bytes) >= 0 && H5Tset_cset(t, H5T_CSET_UTF8) >= 0)
        return t;
    H5Tclose(t);
    return -1;
}

moec_status moec_h5_put_text(moec_h5 *h, const char *path, const char *name, const char *v, moec_err *err)
{
    quiet();
    hid_t t = text_type(strlen(v) + 1);
    moec_status st = t < 0 ? lib_fail(h, MOEC_EIO, path, name, err) : put_attribute(h, path, name, t, t, -1, v, err);
    H5Tclose(t);
    return st;
}

/* ---- reading ------------------------------------------------------------------------------------------------------ */

static moec_status check_link(moec_h5 *h, const char *path, moec_err *err)
{
    H5L_info_t info;
    if (H5Lget_info(h->file, path, &info, H5P_DEFAULT) < 0)
        return bad(h, path, NULL, "missing", err);
    if (info.type != H5L_TYPE_HARD)
        return bad(h, path, NULL, "a soft or external link, expected the object itself", err);
    return MOEC_OK;
}

/* Every link on the way must be a hard one: soft and external links could lead out of the file. */
static moec_status check_path(moec_h5 *h, const char *path, moec_err *err)
{
    char *part;
    quiet();
    moec_status st = moec_copy(&part, path, strlen(path), err);
    for (char *c = part; st == MOEC_OK && (c = strchr(c + 1, '/')) != NULL; *c = '/') {
        *c = '\0';
        st = check_link(h, part, err);
    }
    if (st == MOEC_OK)
        st = check_link(h, path, err);
    moec_free(part);
    return st;
}

static moec_status open_object(hid_t *out, moec_h5 *h, const char *path, H5I_type_t type, moec_err *err)
{
    *out = -1;
    moec_status st = check_path(h, path, err);
    if (st != MOEC_OK)
        return st;
    hid_t o = H5Oopen(h->file, path, H5P_DEFAULT);
    if (o < 0)
        return lib_fail(h, MOEC_EFORMAT, path, "cannot be opened", err);
    if (type != H5I_BADID && H5Iget_type(o) != type) {
        H5Oclose(o);
        return bad(h, path, NULL, type == H5I_DATASET ? "not a dataset" : "not a group", err);
    }
    *out = o;
    return MOEC_OK;
}

/* Extents as text into buf: "[2, 3]", "[]" for one value, "no plain extents". */
static const char *extents(char *buf, size_t cap, hid_t space)
{
    hsize_t extent[MOEC_MAX_RANK];
    int64_t dim[MOEC_MAX_RANK];
    int rank = H5Sis_simple(space) > 0 ? H5Sget_simple_extent_ndims(space) : -1;
    if (rank < 0 || rank > MOEC_MAX_RANK || H5Sget_simple_extent_dims(space, extent, NULL) != rank ||
        H5Sget_simple_extent_type(space) == H5S_NULL)
        return "no plain extents";
    for (int i = 0; i < rank; i++)
        dim[i] = extent[i] > INT64_MAX ? -1 : (int64_t)extent[i];
    return moec_shape_text(buf, cap, rank, dim);
}

static bool same_extents(hid_t space, int rank, const int64_t *dim)
{
    hsize_t extent[MOEC_MAX_RANK];
    H5S_class_t want = rank == 0 ? H5S_SCALAR : H5S_SIMPLE;
    if (H5Sget_simple_extent_type(space) != want || H5Sget_simple_extent_ndims(space) != rank ||
        (rank > 0 && H5Sget_simple_extent_dims(space, extent, NULL) != rank))
        return false;
    for (int i = 0; i < rank; i++)
        if (extent[i] != (hsize_t)dim[i])
            return false;
    return true;
}

static bool plain_filters(hid_t layout)
{
    int n = H5Pget_nfilters(layout);
    for (int i = 0; i < n; i++) {
        unsigned flags, config;
        size_t values = 0;
        H5Z_filter_t f = H5Pget_filter2(layout, (unsigned)i, &flags, &values, NULL, 0, NULL, &config);
        if (f != H5Z_FILTER_SHUFFLE && f != H5Z_FILTER_DEFLATE)
            return false;
    }
    return n >= 0 && n <= 2; /* a stack of deflates could expand without bound */
}

/* NULL when the storage is of a kind that we write, else what is wrong with it. */
static const char *storage_fault(hid_t layout, size_t cell)
{
    hsize_t chunk[MOEC_MAX_RANK];
    H5D_layout_t kind = H5Pget_layout(layout);
    if (kind != H5D_CHUNKED && kind != H5D_CONTIGUOUS && kind != H5D_COMPACT)
        return "a virtual dataset";
    if (H5Pget_external_count(layout) != 0)
        return "kept in another file";
    if (!plain_filters(layout))
        return "filtered by something else than shuffle and deflate";
    if (kind == H5D_CHUNKED) {
        size_t bytes = cell;
        int rank = H5Pget_chunk(layout, MOEC_MAX_RANK, chunk);
        if (rank < 1 || rank > MOEC_MAX_RANK)
            return "chunks without extents";
        for (int i = 0; i < rank; i++)
            if (!moec_mul_size(&bytes, bytes, (size_t)chunk[i]) || bytes > CHUNK_READ)
                return "chunks larger than 64 MiB";
    }
    return NULL;
}

/* All that can be known of a dataset before its values are read; `claim`: its stored bytes cannot be claimed again. */
static moec_status check_array(moec_h5 *h, hid_t d, const char *path, moec_dtype dtype, int rank, const int64_t *dim,
                               size_t bytes, bool claim, moec_err *err)
{
    type_row type = {-1, -1};
    char is[128], want[128];
    const char *fault;
    moec_status st = MOEC_OK;
    hid_t space = H5Dget_space(d), file_type = H5Dget_type(d), layout = H5Dget_create_plist(d);
    if (space < 0 || file_type < 0 || layout < 0 || !type_of(&type, dtype)) {
        st = lib_fail(h, MOEC_EFORMAT, path, "cannot be opened", err);
        goto done;
    }
    if (H5Tequal(file_type, type.disk) <= 0) {
        st = moec_fail(err, MOEC_EFORMAT, "%s: %s: not of type %s", h->name, path, moec_dtypes[dtype].name);
        goto done;
    }
    if (!same_extents(space, rank, dim)) {
        st = moec_fail(err, MOEC_EFORMAT, "%s: %s: %s, expected %s", h->name, path, extents(is, sizeof is, space), moec_shape_text(want, sizeof want, rank, dim));
        goto done;
    }
    fault = storage_fault(layout, (size_t)moec_dtypes[dtype].bytes);
    if (fault) {
        st = bad(h, path, NULL, fault, err);
        goto done;
    }
    uint64_t stored = H5Dget_storage_size(d);
    if (stored > h->left || (bytes > SLACK && (bytes - SLACK) / EXPANSION > stored))
        st = moec_fail(err, MOEC_EFORMAT, "%s: %s: %zu bytes cannot come from %llu stored ones", h->name, path, bytes,
                       (unsigned long long)stored);
    else if (claim)
        h->left -= stored;
done:
    H5Pclose(layout);
    H5Tclose(file_type);
    H5Sclose(space);
    return st;
}

/* An array, or with `first` a part of it, into `out`; into fresh memory where `made` is not NULL. Neither: only looks. */
static moec_status get_values(void **made, void *out, moec_h5 *h, const char *path, moec_dtype dtype, int rank, const int64_t *dim,
                              const int64_t *first, const int64_t *count, moec_err *err)
{
    type_row type = {-1, -1};
    const bool part = first && rank > 0;
    hsize_t from[MOEC_MAX_RANK] = {0}, of[MOEC_MAX_RANK] = {0};
    hid_t d, file = H5S_ALL, memory = H5S_ALL;
    if (rank < 0 || rank > MOEC_MAX_RANK || !type_of(&type, dtype))
        return moec_fail(err, MOEC_EINVAL, "%s: rank %d of %s cannot be read", path, rank, moec_dtypes[dtype].name);
    size_t bytes = (size_t)moec_dtypes[dtype].bytes;
    for (int i = 0; i < rank; i++) {
        if (dim[i] < 1 || !moec_mul_size(&bytes, bytes, (size_t)dim[i]))
            return bad(h, path, NULL, "extents out of range", err);
        if (part && (first[i] < 0 || count[i] < 1 || count[i] > dim[i] || first[i] > dim[i] - count[i]))
            return moec_fail(err, MOEC_EINVAL, "%s: %s: a part beyond its extents was asked for", h->name, path);
        from[i] = part ? (hsize_t)first[i] : 0;
        of[i] = part ? (hsize_t)count[i] : 0;
    }
    moec_status st = open_object(&d, h, path, H5I_DATASET, err);
    if (st != MOEC_OK)
        return st;
    MOEC_TRY(check_array(h, d, path, dtype, rank, dim, bytes, made != NULL, err));
    if (made)
        MOEC_TRY(moec_alloc(&out, bytes, 1, err));
    if (part) {
        file = H5Dget_space(d);
        memory = space_of(rank, count);
    }
    if (out && ((part && H5Sselect_hyperslab(file, H5S_SELECT_SET, from, NULL, of, NULL) < 0) ||
                H5Dread(d, type.memory, memory, file, H5P_DEFAULT, out) < 0))
        st = lib_fail(h, MOEC_EFORMAT, path, "cannot be read", err);
done:
    H5Sclose(memory); /* of H5S_ALL as of -1 nothing */
    H5Sclose(file);
    H5Dclose(d);
    if (made && st != MOEC_OK)
        moec_free(out);
    else if (made)
        *made = out;
    return st;
}

moec_status moec_h5_get_array(void **out, moec_h5 *h, const char *path, moec_dtype dtype, int rank, const int64_t *dim, moec_err *err)
{
    *out = NULL;
    return get_values(out, NULL, h, path, dtype, rank, dim, NULL, NULL, err);
}

moec_status moec_h5_get_part(void *out, moec_h5 *h, const char *path, moec_dtype dtype, int rank, const int64_t *dim,
                             const int64_t *first, const int64_t *count, moec_err *err)
{
    return get_values(NULL, out, h, path, dtype, rank, dim, out ? first : NULL, count, err);
}

/* Opens an attribute and checks type (disk, or any fixed text when disk < 0) and count (n < 0: one plain value). */
static moec_status open_attribute(hid_t *out, moec_h5 *h, const char *path, const char *name, hid_t disk, int64_t n, moec_err *err)
{
    hid_t o, a = -1, space = -1, type = -1;
    *out = -1;
    moec_status st = open_object(&o, h, path, H5I_BADID, err);
    if (st != MOEC_OK)
        return st;
    if (H5Aexists(o, name) > 0)
        a = H5Aopen(o, name, H5P_DEFAULT);
    H5Oclose(o);
    if (a < 0)
        return bad(h, path, name, "missing", err);
    space = H5Aget_space(a);
    type = H5Aget_type(a);
    if (space < 0 || type < 0)
        st = lib_fail(h, MOEC_EFORMAT, path, name, err);
    else if (disk >= 0 ? H5Tequal(type, disk) <= 0 : H5Tget_class(type) != H5T_STRING || H5Tis_variable_str(type) != 0)
        st = bad(h, path, name, disk >= 0 ? "of another type than a 64-bit number" : "not a text of fixed length", err);
    else if (!same_extents(space, n < 0 ? 0 : 1, &n))
        st = bad(h, path, name, "another number of values than expected", err);
    H5Tclose(type);
    H5Sclose(space);
    if (st != MOEC_OK)
        H5Aclose(a);
    else
        *out = a;
    return st;
}

static moec_status get_numbers(void *out, moec_h5 *h, const char *path, const char *name, hid_t disk, hid_t memory, int64_t n, moec_err *err)
{
    hid_t a;
    moec_status st = open_attribute(&a, h, path, name, disk, n, err);
    if (st != MOEC_OK)
        return st;
    if (H5Aread(a, memory, out) < 0)
        st = lib_fail(h, MOEC_EFORMAT, path, name, err);
    H5Aclose(a);
    return st;
}

moec_status moec_h5_get_int(int64_t *out, moec_h5 *h, const char *path, const char *name, int64_t low, int64_t high, moec_err *err)
{
    moec_status st = get_numbers(out, h, path, name, H5T_STD_I64LE, H5T_NATIVE_INT64, -1, err);
    if (st == MOEC_OK && (*out < low || *out > high))
        st = moec_fail(err, MOEC_EFORMAT, "%s: %s attribute %s: is %lld, expected %lld to %lld", h->name, path, name,
                       (long long)*out, (long long)low, (long long)high);
    return st;
}

moec_status moec_h5_get_ints(int64_t *out, moec_h5 *h, const char *path, const char *name, int64_t n, moec_err *err)
{
    return get_numbers(out, h, path, name, H5T_STD_I64LE, H5T_NATIVE_INT64, n, err);
}

moec_status moec_h5_get_real(double *out, moec_h5 *h, const char *path, const char *name, moec_err *err)
{
    moec_status st = get_numbers(out, h, path, name, H5T_IEEE_F64LE, H5T_NATIVE_DOUBLE, -1, err);
    return st == MOEC_OK && !isfinite(*out) ? bad(h, path, name, "not a finite number", err) : st;
}

moec_status moec_h5_get_text(char **out, moec_h5 *h, const char *path, const char *name, size_t max_len, moec_err *err)
{
    hid_t a;
    *out = NULL;
    moec_status st = open_attribute(&a, h, path, name, -1, -1, err);
    if (st != MOEC_OK)
        return st;
    hid_t type = H5Aget_type(a);
    size_t bytes = type >= 0 ? H5Tget_size(type) : 0;
    if (bytes < 1 || bytes > max_len + 1) {
        st = moec_fail(err, MOEC_EFORMAT, "%s: %s attribute %s: %zu bytes, expected at most %zu", h->name, path, name,
                       bytes, max_len + 1);
        goto done;
    }
    MOEC_TRY(moec_alloc((void **)out, bytes + 1, 1, err));
    if (H5Aread(a, type, *out) < 0)
        st = lib_fail(h, MOEC_EFORMAT, path, name, err);
    else if (strlen(*out) > max_len)
        st = bad(h, path, name, "a text without its end", err);
done:
    H5Tclose(type);
    H5Aclose(a);
    if (st != MOEC_OK) {
        moec_free(*out);
        *out = NULL;
    }
    return st;
}

/* How to walk a group: in the order links were made where the file keeps it. */
static H5_index_t index_of(hid_t group)
{
    unsigned order = 0;
    hid_t made = H5Gget_create_plist(group);
    if (made >= 0) {
        if (H5Pget_link_creation_order(made, &order) < 0)
            order = 0;
        H5Pclose(made);
    }
    return order & H5P_CRT_ORDER_TRACKED ? H5_INDEX_CRT_ORDER : H5_INDEX_NAME;
}

moec_status moec_h5_list(char ***out, size_t *n, moec_h5 *h, const char *path, size_t max_n, size_t max_len, moec_err *err)
{
    hid_t g;
    H5G_info_t info;
    size_t cap = *n = 0;
    *out = NULL;
    moec_status st = open_object(&g, h, path, H5I_GROUP, err);
    if (st != MOEC_OK)
        return st;
    H5_index_t index = index_of(g);
    if (H5Gget_info(g, &info) < 0 || info.nlinks > max_n) {
        st = moec_fail(err, MOEC_EFORMAT, "%s: %s: more than %zu members", h->name, path, max_n);
        goto done;
    }
    for (hsize_t i = 0; i < info.nlinks; i++) {
        ssize_t len = H5Lget_name_by_idx(g, ".", index, H5_ITER_INC, i, NULL, 0, H5P_DEFAULT);
        if (len < 1 || (size_t)len > max_len) {
            st = bad(h, path, NULL, "a member's name is empty or too long", err);
            goto done;
        }
        char *name = NULL;
        MOEC_TRY(MOEC_GROW(*out, cap, *n + 1, err));
        MOEC_TRY(moec_alloc((void **)&name, (size_t)len + 1, 1, err));
        (*out)[(*n)++] = name;
        if (H5Lget_name_by_idx(g, ".", index, H5_ITER_INC, i, name, (size_t)len + 1, H5P_DEFAULT) != len) {
            st = lib_fail(h, MOEC_EFORMAT, path, "a member's name cannot be read", err);
            goto done;
        }
    }
done:
    H5Gclose(g);
    if (st != MOEC_OK) {
        moec_names_free(*out, *n);
        *out = NULL;
        *n = 0;
    }
    return st;
}
