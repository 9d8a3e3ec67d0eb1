/* See bind.h: names, single tensors and matrices. */
#include "model/bind.h"

#include "num/blocks.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

static const char layers[] = "model.layers.%d.", root[] = "model.", wrapped[] = "language_model.";

/* One alternative with the prefix that this checkpoint has in place of "model.". */
static void place_prefix(char out[MOEC_NAME], const moec_binder *b, const char *p, int len)
{
    const char *model = b->m->prefix ? b->m->prefix : root, *start = "";
    if (b->mtp_layer && strncmp(p, layers, sizeof layers - 1) == 0) {
        start = b->mtp_layer;
        p += sizeof layers - 1;
        len -= (int)sizeof layers - 1;
    } else if (strncmp(p, root, sizeof root - 1) == 0) {
        start = model;
        p += sizeof root - 1;
        len -= (int)sizeof root - 1;
    } else if (strncmp(model, wrapped, sizeof wrapped - 1) == 0) {
        start = wrapped;
    }
    snprintf(out, MOEC_NAME, "%s%.*s", start, len, p);
}

bool moec__name(char buf[MOEC_NAME], size_t *number_at, const moec_binder *b, const char *pattern, int n)
{
    char name[MOEC_NAME];
    const char *p = pattern;
    for (; n > 0 && p; n--) {
        p = strchr(p, '|');
        p = p ? p + 1 : NULL;
    }
    if (!p)
        return false;
    place_prefix(name, b, p, (int)strcspn(p, "|"));
    size_t len = 0, at = SIZE_MAX;
    int numbers = 0;
    for (p = name; *p && len + 24 < MOEC_NAME;) {
        if (p[0] != '%' || p[1] != 'd') {
            buf[len++] = *p++;
            continue;
        }
        if (numbers == 1)
            at = len;
        len += (size_t)snprintf(buf + len, MOEC_NAME - len, "%lld", (long long)(numbers == 0 ? b->layer : b->expert));
        numbers++;
        p += 2;
    }
    buf[len] = '\0';
    if (number_at)
        *number_at = at;
    return true;
}

static const char weight[] = "weight", gptq[] = "qweight", packed[] = "weight_packed", nested[] = "nested_base";

/* "X.weight" may be there as codes: "X.qweight", "X.weight_packed", "X.nested_base". */
static const moec_tensor *find_codes(const moec_binder *b, char name[MOEC_NAME])
{
    char *end = name + strlen(name) - (sizeof weight - 1);
    const moec_tensor *t = NULL;
    if (!b->m->packed || !moec__ends_in(name, ".weight"))
        return NULL;
    for (int i = 0; !t && i < 3; i++) {
        snprintf(end, (size_t)(name + MOEC_NAME - end), "%s", i == 0 ? gptq : i == 1 ? packed : nested);
        t = moec_ckpt_find(b->m->ckpt, name);
    }
    for (int i = 0; !t && moec_ckpt_gguf(b->m->ckpt) && i < MOEC_BLOCK_COUNT; i++) {
        snprintf(end, (size_t)(name + MOEC_NAME - end), "%s_%s", weight, moec_blocks[i].name);
        t = moec_ckpt_find(b->m->ckpt, name);
    }
    return t;
}

moec_block moec__block_of(const moec_model *m, const char *name)
{
    static const char mark[] = ".weight_";
    const char *at = moec_ckpt_gguf(m->ckpt) ? strstr(name, mark) : NULL;
    return at ? moec_blocks_find(at + sizeof mark - 1) : MOEC_BLOCK_COUNT;
}

/* "X.weight_q4_k" of a GGUF: rows of blocks. */
static moec_status bind_gguf(moec_weight *w, const moec_binder *b, const moec_tensor *t, int64_t rows, int64_t cols, moec_err *err)
{
    const moec_block type = moec__block_of(b->m, t->name);
    const moec_block_traits *k = &moec_blocks[type];
    *w = (moec_weight){.of = t, .rows = rows, .cols = cols, .row_step = cols, .col_step = 1, .storage = MOEC_BLOCKS,
                       .block = (uint8_t)type};
    if (t->rank == 2 && t->dim[0] == rows && moec_weight_check(w, NULL) == MOEC_OK)
        return MOEC_OK;
    return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is [%lld, %lld], expected [%lld, %lld]", moec_ckpt_dir(b->m->ckpt), t->name,
                     (long long)(t->rank == 2 ? t->dim[0] : 0), (long long)(t->rank == 2 ? t->dim[1] / k->bytes * k->elements : 0),
                     (long long)rows, (long long)cols);
}

const moec_tensor *moec__find(const moec_binder *b, const char *pattern)
{
    char name[MOEC_NAME];
    const moec_tensor *t = NULL;
    for (int i = 0; pattern && !t && moec__name(name, NULL, b, pattern, i); i++) {
        t = moec_ckpt_find(b->m->ckpt, name);
        t = t ? t : find_codes(b, name);
    }
    return t;
}

int64_t moec__rows(const moec_tensor *t)
{
    return t->rank < 1 ? 1 : t->dim[t->rank == 2 && t->dtype == MOEC_I32 && moec__ends_in(t->name, ".qweight")];
}

bool moec__ends_in(const char *name, const char *tail)
{
    const size_t n = strlen(name), k = strlen(tail);
    return n >= k && strcmp(name + n - k, tail) == 0;
}

static moec_status missing(const moec_binder *b, const char *pattern, moec_err *err)
{
    char name[MOEC_NAME];
    (void)moec__name(name, NULL, b, pattern, 0);
    return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is missing", moec_ckpt_dir(b->m->ckpt), name);
}

static moec_status check_shape(const moec_tensor *t, const moec_binder *b, int rank, const int64_t *dim, moec_err *err)
{
    char have[160], want[160];
    if (t->rank == rank && memcmp(t->dim, dim, (size_t)rank * sizeof *dim) == 0)
        return MOEC_OK;
    return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is %s, expected %s", moec_ckpt_dir(b->m->ckpt), t->name,
                     moec_shape_text(have, sizeof have, t->rank, t->dim), moec_shape_text(want, sizeof want, rank, dim));
}

static moec_status check_dtype(const moec_tensor *t, const moec_binder *b, moec_err *err)
{
    if (t->dtype == MOEC_F32 || t->dtype == MOEC_F16 || t->dtype == MOEC_BF16)
        return MOEC_OK;
    return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is %s, expected F32, F16 or BF16", moec_ckpt_dir(b->m->ckpt), t->name,
                     moec_dtypes[t->dtype].name);
}

moec_status moec__bind(const moec_tensor **out, const moec_binder *b, const char *pattern, int rank, const int64_t *dim,
                       moec_err *err)
{
    const moec_tensor *t = moec__find(b, pattern);
    if (!t)
        return missing(b, pattern, err);
    moec_status st = check_shape(t, b, rank, dim, err);
    if (st == MOEC_OK)
        st = check_dtype(t, b, err);
    *out = t;
    return st;
}

/* "X.weight" in F8_E4M3 has its scales in "X.weight_scale_inv", one for each block. */
static moec_status bind_scale(moec_weight *w, const moec_binder *b, moec_err *err)
{
    char name[MOEC_NAME + 16];
    const moec_tensor *t = w->of;
    snprintf(name, sizeof name, "%s_scale_inv", t->name);
    w->scale = moec_ckpt_find(b->m->ckpt, name);
    if (!w->scale)
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is F8_E4M3 and its scales %s are missing",
                         moec_ckpt_dir(b->m->ckpt), t->name, name);
    if (b->fp8_block[0] == 0)
        return moec_fail(err, MOEC_EFORMAT, "%s: tensor %s is F8_E4M3, but config.json has no quantization_config with "
                         "quant_method fp8 and weight_block_size", moec_ckpt_dir(b->m->ckpt), t->name);
    w->storage = MOEC_FP8;
    w->block_rows = b->fp8_block[0];
    w->block_cols = b->fp8_block[1];
    const int64_t dim[2] = {(w->rows + w->block_rows - 1) / w->block_rows, (w->cols + w->block_cols - 1) / w->block_cols};
    w->scale_cols = (int32_t)dim[1];
    if (w->scale->dtype == MOEC_F8_E8M0)
        return check_shape(w->scale, b, 2, dim, err);
    moec_status st = check_shape(w->scale, b, 2, dim, err);
    return st == MOEC_OK ? check_dtype(w->scale, b, err) : st;
}

/* The tensor beside codes `t`, whose suffix is `len` long. */
static const moec_tensor *beside(const moec_binder *b, const moec_tensor *t, size_t len, const char *suffix)
{
    char name[MOEC_NAME];
    snprintf(name, sizeof name, "%.*s%s", (int)(strlen(t->name) - len), t->name, suffix);
    return moec_ckpt_find(b->m->ckpt, name);
}

/* Columns in an order of their own (act-order without groups of neighbours) are no view of rows. */
static moec_status check_order(const moec_tensor *t, const moec_binder *b, const moec_weight *w, moec_err *err)
{
    const unsigned char *data = t->data;
    if (t->dtype != MOEC_I32 || t->rank != 1 || t->dim[0] != w->cols)
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is not one I32 a column", moec_ckpt_dir(b->m->ckpt), t->name);
    for (int64_t i = 0; i < w->cols; i++) {
        int32_t group;
        memcpy(&group, data + 4 * i, 4);
        if (group != i / w->block_cols)
            return moec_fail(err, MOEC_EFORMAT, "%s: tensor %s: its groups are not of neighbouring columns (desc_act), which is not "
                             "read; use the unquantized release", moec_ckpt_dir(b->m->ckpt), t->name);
    }
    return MOEC_OK;
}

/* The width that a number of words says; 0: none does. */
static int width_of(int64_t words, int64_t cols)
{
    for (int bits = 1; bits <= 8; bits++)
        if ((cols * bits + 31) / 32 == words)
            return bits;
    return 0;
}

/* compressed-tensors' weight_shape: [rows, cols]. */
static moec_status check_said(const moec_tensor *t, const moec_binder *b, const moec_weight *w, moec_err *err)
{
    int64_t said[2] = {-1, -1};
    int32_t narrow[2];
    if (t->rank == 1 && t->dim[0] == 2 && t->dtype == MOEC_I64) {
        memcpy(said, t->data, sizeof said);
    } else if (t->rank == 1 && t->dim[0] == 2 && t->dtype == MOEC_I32) {
        memcpy(narrow, t->data, sizeof narrow);
        said[0] = narrow[0];
        said[1] = narrow[1];
    }
    if (said[0] != w->rows || said[1] != w->cols)
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s says [%lld, %lld], its codes are [%lld, %lld]", moec_ckpt_dir(b->m->ckpt), t->name,
                         (long long)said[0], (long long)said[1], (long long)w->rows, (long long)w->cols);
    return MOEC_OK;
}

/* "X.qweight" with its qzeros, scales and g_idx; "X.weight_packed" with weight_scale, weight_zero_point. The width and the group
 * are what the shapes say: config.json says it by patterns of names. */
static moec_status bind_codes(moec_weight *w, const moec_binder *b, const moec_tensor *t, int64_t rows, int64_t cols, moec_err *err)
{
    const bool is_gptq = moec__ends_in(t->name, ".qweight");
    const size_t len = is_gptq ? sizeof gptq - 1 : sizeof packed - 1;
    char have[160];
    *w = (moec_weight){.of = t, .rows = rows, .cols = cols, .row_step = cols, .col_step = 1,
                       .storage = is_gptq ? MOEC_GPTQ : MOEC_PACKED};
    w->scale = beside(b, t, len, is_gptq ? "scales" : "weight_scale");
    w->zero = beside(b, t, len, is_gptq ? "qzeros" : "weight_zero_point");
    w->zero_more = is_gptq && b->m->zero_more;
    if (!w->scale || (is_gptq && !w->zero))
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s has no %s beside it", moec_ckpt_dir(b->m->ckpt), t->name,
                         is_gptq ? "scales and qzeros" : "weight_scale");
    const int64_t groups = w->scale->rank == 2 ? w->scale->dim[is_gptq ? 0 : 1] : 0;
    w->bits = (uint8_t)(t->rank == 2 ? width_of(t->dim[is_gptq ? 0 : 1], cols) : 0);
    w->block_cols = groups > 0 && cols % groups == 0 && cols / groups <= INT32_MAX ? (int32_t)(cols / groups) : 0;
    if (moec__rows(t) != rows || moec_weight_check(w, NULL) != MOEC_OK)
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is %s, expected [%lld, %lld] in 1 to 8 bits with its scales",
                         moec_ckpt_dir(b->m->ckpt), t->name, moec_shape_text(have, sizeof have, t->rank, t->dim), (long long)rows,
                         (long long)cols);
    const moec_tensor *said = is_gptq ? NULL : beside(b, t, len, "weight_shape");
    moec_status st = said ? check_said(said, b, w, err) : MOEC_OK;
    if (st != MOEC_OK)
        return st;
    const moec_tensor *order = beside(b, t, len, is_gptq ? "g_idx" : "weight_g_idx");
    return order ? check_order(order, b, w, err) : MOEC_OK;
}

/* "X.nested_base" with nested_scales and nested_planes: as many bits as there are planes, and no more than are asked for. */
static moec_status bind_nested(moec_weight *w, const moec_binder *b, const moec_tensor *t, int64_t rows, int64_t cols, moec_err *err)
{
    char have[160];
    *w = (moec_weight){.of = t, .rows = rows, .cols = cols, .row_step = cols, .col_step = 1, .storage = MOEC_NESTED};
    w->scale = beside(b, t, sizeof nested - 1, "nested_scales");
    w->zero = beside(b, t, sizeof nested - 1, "nested_planes");
    const int64_t groups = w->scale && w->scale->rank == 3 ? w->scale->dim[2] : 0, steps = groups > 0 ? w->scale->dim[0] : 0;
    w->block_cols = groups > 0 && cols % groups == 0 && cols / groups <= INT32_MAX ? (int32_t)(cols / groups) : 0;
    w->bits = (uint8_t)(steps >= 1 && steps <= 7 ? steps + 1 : 0);
    if (moec__rows(t) != rows || moec_weight_check(w, NULL) != MOEC_OK)
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is %s, expected [%lld, %lld / 4] with nested_scales [1 + p, %lld, groups] and "
                         "nested_planes [p, %lld, %lld / 8], p from 0 to 6", moec_ckpt_dir(b->m->ckpt), t->name,
                         moec_shape_text(have, sizeof have, t->rank, t->dim), (long long)rows, (long long)cols, (long long)rows,
                         (long long)rows, (long long)cols);
    w->bits = b->m->read_bits > 0 && b->m->read_bits < w->bits ? (uint8_t)b->m->read_bits : w->bits;
    return MOEC_OK;
}

moec_status moec__bind_matrix(moec_weight *out, const moec_binder *b, const char *pattern, int64_t rows, int64_t cols,
                              moec_err *err)
{
    const int64_t dim[2] = {rows, cols};
    const moec_tensor *t = moec__find(b, pattern);
    if (!t)
        return missing(b, pattern, err);
    if (t->dtype == MOEC_I32 && (moec__ends_in(t->name, ".qweight") || moec__ends_in(t->name, ".weight_packed")))
        return bind_codes(out, b, t, rows, cols, err);
    if (t->dtype == MOEC_U8 && moec__ends_in(t->name, ".nested_base"))
        return bind_nested(out, b, t, rows, cols, err);
    if (moec__block_of(b->m, t->name) < MOEC_BLOCK_COUNT)
        return bind_gguf(out, b, t, rows, cols, err);
    moec_status st = check_shape(t, b, 2, dim, err);
    if (st != MOEC_OK)
        return st;
    *out = moec_weight_of(t);
    return t->dtype == MOEC_F8_E4M3 ? bind_scale(out, b, err) : check_dtype(t, b, err);
}

moec_status moec__bind_bias(const moec_tensor **out, const moec_binder *b, const char *pattern, int64_t n, moec_err *err)
{
    static const char tail[] = ".weight";
    char bias[MOEC_NAME];
    size_t len = strcspn(pattern, "|"), cut = sizeof tail - 1;
    *out = NULL;
    /* every alternative of a matrix names its bias alike, so the first that is there decides */
    for (const char *p = pattern; *p; p += len + (p[len] == '|')) {
        len = strcspn(p, "|");
        if (len < cut || len >= sizeof bias || strncmp(p + len - cut, tail, cut) != 0)
            continue;
        snprintf(bias, sizeof bias, "%.*s.bias", (int)(len - cut), p);
        if (moec__find(b, bias))
            return moec__bind(out, b, bias, 1, &n, err);
    }
    return MOEC_OK;
}

moec_status moec__cut(moec_weight *out, const moec_weight *all, const moec_binder *b, int64_t at, int64_t rows,
                      moec_err *err)
{
    if (all->storage != MOEC_PLAIN)
        return moec_fail(err, MOEC_ESHAPE, "%s: tensor %s is quantized; parts of a joined matrix are read in F32, F16 or BF16 "
                         "only", moec_ckpt_dir(b->m->ckpt), all->of->name);
    *out = *all;
    out->at += at * all->row_step;
    out->rows = rows;
    return MOEC_OK;
}
