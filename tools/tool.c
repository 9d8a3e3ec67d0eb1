/* How every verb begins and ends. */
#include "tool.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

const char *const tool_dtypes[] = {"source", "bf16", "f16", "f32", NULL};

moec_dtype tool_dtype(int choice)
{
    return choice > 0 ? moec_plan_dtype(tool_dtypes[choice]) : MOEC_DTYPE_COUNT;
}

static bool asks_for_help(int argc, char **argv)
{
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++)
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0)
            return true;
    return false;
}

bool tool_begin(int *exit_code, void *params, moec_opt_list *words, const moec_verb *verb, int argc, char **argv)
{
    *exit_code = 0;
    if (asks_for_help(argc, argv)) {
        moec_opt_help(stdout, verb);
        return false;
    }
    moec_err err = {MOEC_OK, ""};
    moec_status st = moec_opt_parse(params, words, verb, argc, argv, &err);
    const tool_common *common = params;
    if (st == MOEC_OK && common->quiet && common->verbose)
        st = moec_fail(&err, MOEC_EINVAL, "--quiet and --verbose exclude each other");
    if (st != MOEC_OK) {
        *exit_code = tool_end(st, &err);
        return false;
    }
    moec_par_set_threads((int)common->threads);
    moec_log_set(common->quiet ? MOEC_QUIET : common->verbose ? MOEC_VERBOSE : MOEC_NORMAL);
    moec_catch_signals();
    return true;
}

int tool_end(moec_status st, const moec_err *err)
{
    if (st != MOEC_OK)
        fprintf(stderr, "moecompress: error: %s%s\n", err->text[0] ? err->text : "failed without a reason",
                st == MOEC_EINTR && strcmp(err->text, "interrupted") == 0 ? "; run the same command again to continue" : "");
    return moec_exit_code(st);
}

int tool_fail(const moec_err *err)
{
    return tool_end(err->code == MOEC_OK ? MOEC_EIO : err->code, err);
}

/* Is it empty, or does it begin as this program's files of that kind do? HDF5 lies behind a user block of 512 bytes. */
static moec_status is_ours(bool *yes, const char *path, tool_file kind, moec_err *err)
{
    static const char hdf5[] = "\211HDF\r\n\032\n";
    static const char *const word[] = {
        [TOOL_FILE_PLAN] = "\"moecompress_plan\"", [TOOL_FILE_REFERENCE] = "moecompress reference",
        [TOOL_FILE_PATTERNS] = "\"moecompress_patterns\"", [TOOL_FILE_RECORD] = "\"loss_nearest\"", [TOOL_FILE_IMATRIX] = "imatrix.datasets",
        [TOOL_FILE_THRESHOLDS] = "\"format\": \"moecompress-"};
    char front[1024];
    FILE *f = fopen(path, "rb");
    if (!f)
        return moec_fail_errno(err, errno, path);
    size_t n = fread(front, 1, sizeof front - 1, f);
    fclose(f);
    front[n] = '\0';
    if (kind == TOOL_FILE_HDF5) {
        *yes = n == 0 || (n >= 520 && memcmp(front + 512, hdf5, 8) == 0);
        return MOEC_OK;
    }
    for (size_t i = 0; i < n; i++)
        if (front[i] == '\0')
            front[i] = ' ';
    *yes = n == 0 || strstr(front, word[kind]) != NULL ||
           (kind == TOOL_FILE_IMATRIX && n > 12 && memcmp(front + 8, "blk.", 4) == 0 && /* the form without a magic: two numbers, a name */
            strstr(front, ".ffn_gate_exps.weight") != NULL);
    return MOEC_OK;
}

/* The folder of a path that shall be written, "" for one without a slash; free with moec_free. */
static moec_status folder_of(char **out, const char *path, moec_err *err)
{
    return moec_copy(out, path, (size_t)(moec_path_base(path) - path), err);
}

moec_status tool_may_write(const char *path, tool_file kind, bool overwrite, moec_err *err)
{
    static const char *const names[] = {[TOOL_FILE_HDF5] = "a statistics or trace file", [TOOL_FILE_PLAN] = "a plan",
                                        [TOOL_FILE_REFERENCE] = "a reference file", [TOOL_FILE_PATTERNS] = "a pattern store",
                                        [TOOL_FILE_RECORD] = "a record of matrices", [TOOL_FILE_IMATRIX] = "an importance matrix",
                                        [TOOL_FILE_THRESHOLDS] = "a file of thresholds"};
    moec_status st = MOEC_OK;
    struct stat info;
    char *folder = NULL;
    bool ours = true;
    if (!*path)
        return moec_fail(err, MOEC_EINVAL, "the output file has an empty name");
    bool there = stat(path, &info) == 0;
    MOEC_TRY(folder_of(&folder, path, err));
    if (!there && *folder) { /* then look again: "new/../config.json" is one that is there */
        MOEC_TRY(moec_dir_make(folder, err));
        there = stat(path, &info) == 0;
    }
    if (there && !overwrite)
        MOEC_TRY(kind == TOOL_FILE_REFERENCE
                     ? moec_fail(err, MOEC_EEXIST, "%s: is already there; move it away or choose another name", path)
                     : moec_fail(err, MOEC_EEXIST, "%s: is already there; --overwrite replaces it", path));
    if (there && !S_ISREG(info.st_mode))
        MOEC_TRY(moec_fail(err, MOEC_EEXIST, "%s: is there and is not a regular file; it is not replaced", path));
    if (there)
        MOEC_TRY(is_ours(&ours, path, kind, err));
    if (!ours)
        MOEC_TRY(moec_fail(err, MOEC_EEXIST, "%s: is there and is not %s of moecompress; it is not replaced", path, names[kind]));
    if (access(*folder ? folder : ".", W_OK) != 0)
        st = moec_fail_errno(err, errno, *folder ? folder : ".");
done:
    moec_free(folder);
    return st;
}

uint64_t tool_file_bytes(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 ? (uint64_t)info.st_size : 0;
}

moec_json *tool_bytes_json(uint64_t source, const char *path)
{
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "source", moec_json_new_int((int64_t)source));
    moec_json_set(o, "output", moec_json_new_int((int64_t)tool_file_bytes(path)));
    return o;
}

bool tool_same_file(const char *a, const char *b)
{
    struct stat x, y;
    char *p = NULL, *q = NULL;
    moec_err err;
    bool same = strcmp(a, b) == 0;
    if (!same && strcmp(moec_path_base(a), moec_path_base(b)) == 0 && folder_of(&p, a, &err) == MOEC_OK &&
        folder_of(&q, b, &err) == MOEC_OK)
        same = stat(*p ? p : ".", &x) == 0 && stat(*q ? q : ".", &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
    moec_free(p);
    moec_free(q);
    return same;
}

moec_status tool_print_json(moec_json *v, moec_err *err)
{
    char *text;
    moec_status st = moec_json_dump(&text, v, 2, err);
    if (st == MOEC_OK)
        printf("%s\n", text);
    moec_free(text);
    moec_json_free(v);
    return st;
}

const char *tool_s(int64_t n)
{
    return n == 1 ? "" : "s";
}

void tool_print_method(const moec_method *m)
{
    printf("%s%s\n    %s\n    %s\n    %s%s%s%s\n", m->name, m->is_default ? " (the default)" : "", m->brief, m->formula, m->paper,
           m->arxiv ? " (arXiv:" : "", m->arxiv ? m->arxiv : "", m->arxiv ? ")" : "");
}

moec_status tool_list_methods(moec_method_kind kind, bool json, moec_err *err)
{
    const moec_method *m;
    if (json)
        return tool_print_json(moec_method_list(kind), err);
    for (size_t i = 0; (m = moec_method_at(i)) != NULL; i++)
        if (m->kind == kind) {
            tool_print_method(m);
            printf("\n");
        }
    return MOEC_OK;
}

const char *tool_method_entry(const char **text, moec_method_kind kind, size_t i)
{
    static char buf[1200];
    const moec_method *m;
    for (size_t at = 0; (m = moec_method_at(at)) != NULL; at++)
        if (m->kind == kind && i-- == 0)
            break;
    if (!m)
        return NULL;
    snprintf(buf, sizeof buf, "%s: %s [%s%s%s]", m->brief, m->formula, m->paper, m->arxiv ? ", arXiv:" : "",
             m->arxiv ? m->arxiv : "");
    *text = buf;
    return m->name;
}

moec_status tool_is_folder(const moec_model *m, moec_err *err)
{
    return moec_ckpt_gguf(m->ckpt) ? moec_fail(err, MOEC_EFORMAT, "%s: a GGUF is read but not rewritten; make a folder of it first: "
                                               "moecompress convert %s -o DIR", moec_ckpt_dir(m->ckpt), moec_ckpt_dir(m->ckpt))
                                   : MOEC_OK;
}
