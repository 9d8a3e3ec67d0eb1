/* Statistics files from anywhere. An input that begins like a statistics file is one: it is loaded as it is, which the
 * seal refuses unless it is intact, and once more without the seal, so that mutants reach HDF5, whose checksums refuse most.
 * Any other input is a list of mistakes: it steers the writing of a file, sound to HDF5, in which attributes, arrays and
 * names are wrong or missing, and that file is loaded. A load ends in a code with a text, or in statistics that can be
 * described, merged and are within bounds. Files are kept in memory. */
#include "base/mem.h"
#include "calib/stats_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
const char *__lsan_default_suppressions(void);

/* HDF5 loses some bytes of its own when metadata turns out malformed. */
const char *__lsan_default_suppressions(void)
{
    return "leak:libhdf5";
}

static void check(bool holds)
{
    if (!holds)
        abort();
}

static void check_failure(moec_status st, const moec_stats *s, const moec_err *err)
{
    check((st == MOEC_EFORMAT || st == MOEC_ENOMEM || st == MOEC_EIO) && !s && err->code == st && err->text[0] != '\0');
}

static void use(moec_stats *s)
{
    moec_json *v;
    moec_err err = {MOEC_OK, ""};
    char *text = NULL, *dropped = NULL;
    check(moec__stats_meta_check(&s->meta, MOEC_EINVAL, &err) == MOEC_OK);
    check(moec__stats_values_check(s, MOEC_ENUMERIC, &err) == MOEC_OK);
    if (s->meta.moe_layers * s->meta.experts < 100000) {
        check(moec_stats_describe(&v, s, 10, &err) == MOEC_OK);
        check(moec_json_dump(&text, v, 0, &err) == MOEC_OK);
        moec_json_free(v);
        moec_free(text);
    }
    const char *gone = s->sensitivity ? "gguf" : "";
    check(moec_stats_merge(s, s, &dropped, &err) == MOEC_OK && strcmp(dropped, gone) == 0 && !s->sensitivity);
    moec_free(dropped);
}

static void read_open(moec_h5 *h)
{
    moec_stats *s;
    moec_err err = {MOEC_OK, ""};
    moec_status st = moec__stats_read(&s, h, &err);
    if (st == MOEC_OK)
        use(s);
    else
        check_failure(st, s, &err);
    moec_stats_free(s);
    (void)!moec_h5_close(h, NULL); /* a malformed file may fail to close; the handle is gone all the same */
}

static void try_bytes(const uint8_t *data, size_t size)
{
    moec_stats *s;
    moec_h5 *h;
    moec_err err = {MOEC_OK, ""};
    moec_status st = moec_stats_load_memory(&s, data, size, "input", &err);
    if (st == MOEC_OK)
        moec_stats_free(s);
    else
        check_failure(st, s, &err);
    st = moec_h5_open_image(&h, data, size, "input", &err);
    if (st == MOEC_OK)
        read_open(h);
    else
        check_failure(st, NULL, &err);
}

/* ---- files with mistakes ------------------------------------------------------------------------------------------ */

typedef struct steps {
    const uint8_t *at, *end;
} steps;

static int64_t take(steps *in, size_t n)
{
    uint64_t v = 0;
    for (size_t i = 0; i < n && in->at < in->end; i++)
        v = v << 8 | *in->at++;
    return (int64_t)v;
}

/* Text of up to 40 bytes without NUL. */
static const char *take_text(char *buf, steps *in)
{
    size_t n = (size_t)take(in, 1) % 40, at = 0;
    for (; at < n && in->at < in->end && *in->at; at++)
        buf[at] = (char)*in->at++;
    buf[at] = '\0';
    return buf;
}

/* One attribute in place of the right one. A byte of 200 and more writes the right one, which is what the end of the input
 * gives as well. */
enum { RIGHT = 200 };
static bool mistake(moec_h5 *h, const char *path, const char *name, steps *in)
{
    char text[48];
    int64_t many[4];
    moec_status st = MOEC_OK;
    if (in->at >= in->end)
        return false;
    int64_t kind = take(in, 1);
    if (kind >= RIGHT)
        return false;
    double real = (double)take(in, kind % 8 > 1 ? 1 : 0);
    switch (kind % 8) {
    case 0: break; /* left out */
    case 1: st = moec_h5_put_int(h, path, name, take(in, 8), NULL); break;
    case 2: st = moec_h5_put_int(h, path, name, take(in, 1), NULL); break;
    case 3: st = moec_h5_put_real(h, path, name, kind & 64 ? 1 / real : -real, NULL); break;
    case 4:
    case 5: st = moec_h5_put_text(h, path, name, take_text(text, in), NULL); break;
    default:
        for (int i = 0; i < 4; i++)
            many[i] = take(in, 1);
        st = moec_h5_put_ints(h, path, name, many, 1 + kind % 4, NULL);
    }
    (void)st;
    return true;
}

static void put_meta(moec_h5 *h, steps *in)
{
    static const struct {
        const char *name, *text;
        int64_t v;
    } row[] = {{"format_version", NULL, 1}, {"model", "m", 0}, {"model_type", "t", 0}, {"router_rule", "{}", 0},
               {"options", "{}", 0}, {"compute", "f32", 0}, {"layers", NULL, 3}, {"moe_layers", NULL, 2},
               {"experts", NULL, 3}, {"top_k", NULL, 2}, {"hidden", NULL, 2}, {"expert_width", NULL, 2},
               {"tier", NULL, 1}, {"kinds", "selected gate_sum out_absmax out_channel xin_sq block_tokens gguf", 0}};
    static const int64_t layers[] = {0, 2};
    check(moec_h5_group(h, "/meta", NULL) == MOEC_OK);
    for (size_t i = 0; i < MOEC_COUNT(row); i++)
        if (!mistake(h, "/meta", row[i].name, in))
            check((row[i].text ? moec_h5_put_text(h, "/meta", row[i].name, row[i].text, NULL)
                               : moec_h5_put_int(h, "/meta", row[i].name, row[i].v, NULL)) == MOEC_OK);
    if (!mistake(h, "/meta", "moe_layer", in))
        check(moec_h5_put_ints(h, "/meta", "moe_layer", layers, 2, NULL) == MOEC_OK);
}

static void put_array(moec_h5 *h, const char *path, moec_dtype dtype, int rank, int64_t dim[4], steps *in)
{
    static const moec_dtype dtypes[] = {MOEC_F64, MOEC_F32, MOEC_I64, MOEC_I32, MOEC_U64, MOEC_U32};
    uint64_t values[256] = {0};
    int64_t n = 1, kind = in->at < in->end ? take(in, 1) : 255;
    if (kind < 20)
        return; /* left out */
    if (kind < 60)
        dtype = dtypes[kind % 6];
    else if (kind < 100)
        rank = (int)(kind % 4);
    for (int i = 0; i < 4; i++) {
        if (kind >= 100 && kind < RIGHT && i == kind % 4)
            dim[i] = 1 + take(in, 1);
        n *= i < rank ? dim[i] : 1;
    }
    for (int i = 0; i < 8 && kind >= 230; i++)
        values[i] = (uint64_t)take(in, 8);
    if (n > 0 && n <= 256)
        check(moec_h5_put_array(h, path, dtype, rank, dim, values, NULL) == MOEC_OK);
}

static void put_domain(moec_h5 *h, steps *in)
{
    static const struct {
        const char *name;
        moec_dtype dtype;
        int rank;
        int64_t dim[4];
    } row[] = {{"t0/selected", MOEC_U64, 2, {2, 3, 1, 1}}, {"t0/gate_sum", MOEC_F64, 2, {2, 3, 1, 1}},
               {"t0/out_absmax", MOEC_F32, 2, {2, 3, 1, 1}}, {"t0/out_channel", MOEC_I32, 2, {2, 3, 1, 1}},
               {"t0/block_tokens", MOEC_U64, 0, {1, 1, 1, 1}}, {"t1/xin_sq", MOEC_F64, 3, {2, 3, 2, 1}}};
    char name[48], group[80], path[160];
    snprintf(group, sizeof group, "/domains/%s", take_text(name, in));
    if (strchr(name, '/') || moec_h5_group(h, group, NULL) != MOEC_OK)
        return; /* no name, "." or one that is there */
    for (int t = 0; t < 2; t++) {
        snprintf(path, sizeof path, "%s/t%d", group, t);
        check(moec_h5_group(h, path, NULL) == MOEC_OK);
    }
    if (!mistake(h, group, "tokens", in))
        check(moec_h5_put_int(h, group, "tokens", 10, NULL) == MOEC_OK);
    if (!mistake(h, group, "sequences", in))
        check(moec_h5_put_int(h, group, "sequences", 2, NULL) == MOEC_OK);
    if (!mistake(h, group, "weight", in))
        check(moec_h5_put_real(h, group, "weight", 1, NULL) == MOEC_OK);
    if (!mistake(h, group, "digest", in))
        check(moec_h5_put_text(h, group, "digest", "", NULL) == MOEC_OK);
    for (size_t i = 0; i < MOEC_COUNT(row); i++) {
        int64_t dim[4];
        memcpy(dim, row[i].dim, sizeof dim);
        snprintf(path, sizeof path, "%s/%s", group, row[i].name);
        put_array(h, path, row[i].dtype, row[i].rank, dim, in);
    }
}

/* Two tensors, a with squares and b without. */
static void put_gguf(moec_h5 *h, steps *in)
{
    static const struct {
        const char *name;
        int64_t v;
    } row[] = {{"tokens", 3}, {"tensors", 2}, {"name_bytes", 4}, {"square_values", 2}};
    static const struct {
        const char *path;
        int rank;
        int64_t dim[4];
    } array[] = {{"/gguf/square", 1, {2, 1, 1, 1}}, {"/gguf/error", 2, {2, 3, 1, 1}}, {"/gguf/probe", 2, {2, 2, 1, 1}},
                 {"/gguf/kl", 2, {2, 2, 1, 1}}};
    static const int64_t bits[] = {2, 4};
    const int64_t name_dim[] = {4}, size_dim[] = {2, 2};
    char name[] = "a\nb\n";
    int64_t size[] = {2, 2, 5, 0};
    check(moec_h5_group(h, "/gguf", NULL) == MOEC_OK);
    for (size_t i = 0; i < MOEC_COUNT(row); i++)
        if (!mistake(h, "/gguf", row[i].name, in))
            check(moec_h5_put_int(h, "/gguf", row[i].name, row[i].v, NULL) == MOEC_OK);
    if (!mistake(h, "/gguf", "types", in))
        check(moec_h5_put_text(h, "/gguf", "types", "q4_0 later q8_0", NULL) == MOEC_OK);
    if (!mistake(h, "/gguf", "probe_bits", in))
        check(moec_h5_put_ints(h, "/gguf", "probe_bits", bits, 2, NULL) == MOEC_OK);
    if (in->at < in->end && *in->at < RIGHT) {
        const int64_t what = take(in, 1);
        if (what < 4)
            name[what] = (char)take(in, 1);
        else
            size[what % 4] = take(in, 2) - 8;
    }
    check(moec_h5_put_array(h, "/gguf/name", MOEC_U8, 1, name_dim, name, NULL) == MOEC_OK);
    check(moec_h5_put_array(h, "/gguf/size", MOEC_I64, 2, size_dim, size, NULL) == MOEC_OK);
    for (size_t i = 0; i < MOEC_COUNT(array); i++) {
        int64_t dim[4];
        memcpy(dim, array[i].dim, sizeof dim);
        put_array(h, array[i].path, MOEC_F64, array[i].rank, dim, in);
    }
}

static void try_steps(steps in)
{
    char path[64];
    moec_h5 *h;
    moec_err err = {MOEC_OK, ""};
    int fd = memfd_create("fuzz", MFD_CLOEXEC);
    check(fd >= 0);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    check(moec_h5_create(&h, path, &err) == MOEC_OK);
    put_meta(h, &in);
    check(moec_h5_group(h, "/domains", &err) == MOEC_OK);
    for (int d = 0; d < 3 && in.at < in.end; d++)
        put_domain(h, &in);
    put_gguf(h, &in);
    check(moec_h5_close(h, &err) == MOEC_OK);
    off_t size = lseek(fd, 0, SEEK_END);
    void *bytes = mmap(NULL, (size_t)size, PROT_READ, MAP_PRIVATE, fd, 0);
    check(size > 0 && bytes != MAP_FAILED);
    check(moec_h5_open_image(&h, bytes, (size_t)size, "steps", &err) == MOEC_OK);
    munmap(bytes, (size_t)size);
    close(fd);
    read_open(h);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    size_t n = strlen(MOEC_STATS_TITLE);
    if (size >= n && memcmp(data, MOEC_STATS_TITLE, n) == 0)
        try_bytes(data, size);
    else
        try_steps((steps){data, data + size});
    return 0;
}
