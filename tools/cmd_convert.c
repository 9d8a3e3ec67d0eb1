/* convert: a GGUF as a folder of Hugging Face's form. */
#include "tool.h"

#include <inttypes.h>

typedef struct convert_params {
    tool_common common;
    const char *output;
    int dtype;
    uint64_t shard_size;
} convert_params;

static const char *const dtypes[] = {"auto", "bf16", "f16", "f32", NULL};
static const moec_dtype types[] = {MOEC_DTYPE_COUNT, MOEC_BF16, MOEC_F16, MOEC_F32};

static const moec_opt rows[] = {
    {"output", 'o', MOEC_TEXT(convert_params, output), .value = "OUT", .help = "folder to write"},
    {"dtype", 0, MOEC_CHOICE(convert_params, dtype), .choices = dtypes, .fallback = "auto", .value = "auto|bf16|f16|f32",
     .help = "number format of the tensors; auto is that of the file's experts, bf16 where they are quantized"},
    {"shard-size", 0, MOEC_SIZE(convert_params, shard_size), .value = "SIZE", .fallback = "5GB",
     .help = "most bytes of tensors in one file"},
    TOOL_DRY_RUN_ROW(convert_params),
    TOOL_OVERWRITE_ROW(convert_params),
    TOOL_RESUME_ROW(convert_params),
    TOOL_COMMON_ROWS(convert_params),
    TOOL_END_ROW,
};

static moec_json *to_json(const moec_convert_result *r, const moec_model *m, const char *out)
{
    moec_json *o = moec_json_new_object(), *bytes = moec_json_new_object();
    moec_json_set(o, "model_type", moec_json_new_string(m->family->model_type));
    moec_json_set(o, "dtype", moec_json_new_string(moec_dtypes[r->dtype].name));
    moec_json_set(o, "quantized_source", moec_json_new_bool(r->quantized));
    moec_json_set(o, "tokenizer", moec_json_new_bool(r->tokenizer));
    moec_json_set(o, "tensors", moec_json_new_int((int64_t)r->tensors));
    moec_json_set(o, "shards", moec_json_new_int((int64_t)r->shards));
    moec_json_set(bytes, "source", moec_json_new_int((int64_t)r->source_bytes));
    moec_json_set(bytes, "output", moec_json_new_int((int64_t)r->bytes));
    moec_json_set(bytes, "disk", moec_json_new_int((int64_t)r->disk_bytes));
    moec_json_set(o, "bytes", bytes);
    moec_json_set(o, "output", out ? moec_json_new_string(out) : moec_json_new_null());
    return o;
}

static void print(const moec_convert_result *r, const moec_model *m, const char *out)
{
    char size[32];
    printf("%s: %s, %" PRIu64 " tensors in %s, %s in %" PRIu64 " file%s%s%s\n", out ? out : "would be", m->family->model_type, r->tensors,
           moec_dtypes[r->dtype].name, moec_size_text(size, sizeof size, r->bytes), r->shards, tool_s((int64_t)r->shards),
           r->tokenizer ? ", with a tokenizer" : ", without a tokenizer",
           !r->quantized ? "" : r->dtype == MOEC_F32 ? "; values as they were quantized" : "; values as they were quantized, rounded (--dtype f32 does not)");
}

static moec_status convert(const convert_params *p, const char *file, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_model *m = NULL;
    moec_convert_result r;
    const moec_convert_options o = {.out = p->common.dry_run ? NULL : p->output, .dtype = types[p->dtype], .shard_bytes = p->shard_size,
                                    .overwrite = p->common.overwrite, .resume = p->common.resume};
    if (!p->output && !p->common.dry_run)
        return moec_fail(err, MOEC_EINVAL, "-o OUT is missing: where shall the folder be written?");
    if (p->output) {
        const moec_writer_options place = {.dir = p->output, .source = file, .overwrite = p->common.overwrite};
        MOEC_TRY(moec_place_check(&place, err));
    }
    MOEC_TRY(moec_model_open(&m, file, err));
    MOEC_TRY(moec_convert(&r, m, &o, err));
    if (p->common.json)
        MOEC_TRY(tool_print_json(to_json(&r, m, o.out), err));
    else
        print(&r, m, o.out);
done:
    moec_model_close(m);
    return st;
}

static int run(const moec_verb *verb, int argc, char **argv)
{
    convert_params p;
    moec_opt_list words = {0};
    moec_err err = {MOEC_OK, ""};
    int rc;
    if (!tool_begin(&rc, &p, &words, verb, argc, argv))
        return rc;
    return tool_end(convert(&p, words.at[0], &err), &err);
}

const moec_verb moec_verb_convert = {
    .name = "convert",
    .args = "FILE.gguf -o OUT",
    .brief = "write a GGUF as a folder with config.json, safetensors and tokenizer",
    .about = "For models that exist only as GGUF: config.json is made from the keys, the tensors get the names and shapes of the "
             "family's releases, the tokenizer is made from its tokens and merges. Values of quantized tensors are written as they "
             "are, rounded to --dtype; nothing that quantizing took comes back. Of several files (NAME-00001-of-0000N.gguf) give the "
             "first. inspect, calibrate and eval take a GGUF as it is; verbs that write a model's folder take what convert wrote.",
    .examples = "moecompress convert Qwen3-30B-A3B-Q8_0.gguf -o Qwen3-30B-A3B\n"
                "moecompress convert mixtral-00001-of-00003.gguf -o mixtral --dtype f16 --shard-size 2GiB",
    .opts = rows,
    .min_args = 1,
    .max_args = 1,
    .run = run,
};
