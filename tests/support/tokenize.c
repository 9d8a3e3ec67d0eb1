/* Runs the tokenizer for tests written in Python.
 *
 *   tokenize [--special] TOKENIZER_JSON < frames    one line of ids for each frame
 *   tokenize --decode TOKENIZER_JSON < frames       frames of ids (32 bits each): one line of text in hexadecimal
 *   tokenize --time N TOKENIZER_JSON FILE...        best of N: seconds for all files whole, and line by line
 *
 * A frame is its length in bytes (32 bits, little endian) and the bytes. What fails is a line "error CODE TEXT". */
#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"
#include "text/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool read_frame(char **bytes, size_t *cap, size_t *n)
{
    unsigned char head[4];
    if (fread(head, 1, 4, stdin) != 4)
        return false;
    *n = (size_t)head[0] | (size_t)head[1] << 8 | (size_t)head[2] << 16 | (size_t)head[3] << 24;
    return MOEC_GROW(*bytes, *cap, *n + 1, NULL) == MOEC_OK && fread(*bytes, 1, *n, stdin) == *n;
}

static void print_error(const moec_err *err)
{
    printf("error %d %s\n", (int)err->code, err->text);
}

static void print_ids(const moec_ids *ids)
{
    for (size_t i = 0; i < ids->n; i++)
        printf(i ? " %d" : "%d", ids->id[i]);
    putchar('\n');
}

static void decode_frame(const moec_tokenizer *t, const char *frame, size_t n, bool skip)
{
    moec_err err = {0};
    char *text = NULL;
    size_t len = 0;
    int32_t *ids = NULL;
    if (MOEC_NEW(ids, n / 4 + 1, &err) == MOEC_OK) {
        memcpy(ids, frame, n / 4 * 4);
        if (moec_decode(&text, &len, t, ids, n / 4, skip, &err) == MOEC_OK) {
            for (size_t i = 0; i < len; i++)
                printf("%02x", (unsigned char)text[i]);
            putchar('\n');
        }
    }
    if (err.code != MOEC_OK)
        print_error(&err);
    moec_free(text);
    moec_free(ids);
}

static double best_of(int rounds, moec_encoder *e, char *const *text, const size_t *len, int n, bool lines,
                      size_t *n_ids)
{
    double best = 1e30;
    moec_ids ids = {0};
    for (int r = 0; r < rounds; r++) {
        double start = moec_now();
        ids.n = 0;
        for (int i = 0; i < n; i++) {
            for (size_t at = 0; at < len[i];) {
                const char *end = lines ? memchr(text[i] + at, '\n', len[i] - at) : NULL;
                size_t size = end ? (size_t)(end - text[i]) - at : len[i] - at;
                if (moec_encode(&ids, NULL, e, text[i] + at, size, NULL, NULL) != MOEC_OK)
                    return -1.0;
                at += size + 1;
            }
        }
        double took = moec_now() - start;
        best = took < best ? took : best;
        *n_ids = ids.n;
    }
    moec_ids_release(&ids);
    return best;
}

static int time_files(const moec_tokenizer *t, int rounds, char **path, int n)
{
    enum { MAX_FILES = 64 };
    char *text[MAX_FILES] = {0};
    size_t len[MAX_FILES] = {0}, n_ids = 0;
    moec_err err = {0};
    moec_encoder *e = NULL;
    moec_status st = moec_encoder_new(&e, t, &err);
    n = n < MAX_FILES ? n : MAX_FILES;
    for (int i = 0; i < n && st == MOEC_OK; i++)
        st = moec_file_read(&text[i], &len[i], path[i], (size_t)1 << 30, &err);
    if (st == MOEC_OK) {
        printf("whole %.6f", best_of(rounds, e, text, len, n, false, &n_ids));
        printf(" ids %zu", n_ids);
        printf(" lines %.6f", best_of(rounds, e, text, len, n, true, &n_ids));
        printf(" ids %zu\n", n_ids);
    } else {
        print_error(&err);
    }
    for (int i = 0; i < n; i++)
        moec_free(text[i]);
    moec_encoder_free(e);
    return st == MOEC_OK ? 0 : 1;
}

static void run_frames(moec_encoder *e, const moec_tokenizer *t, bool special, bool decode, bool skip)
{
    char *bytes = NULL;
    size_t cap = 0, n;
    moec_ids ids = {0};
    moec_encode_opts opts = {.add_special = special};
    while (read_frame(&bytes, &cap, &n)) {
        moec_err err = {0};
        ids.n = 0;
        if (decode)
            decode_frame(t, bytes, n, skip);
        else if (moec_encode(&ids, NULL, e, bytes, n, &opts, &err) == MOEC_OK)
            print_ids(&ids);
        else
            print_error(&err);
    }
    moec_ids_release(&ids);
    moec_free(bytes);
}

int main(int argc, char **argv)
{
    moec_err err = {0};
    moec_tokenizer *t = NULL;
    moec_encoder *e = NULL;
    int at = 1, rounds = 0;
    bool special = false, decode = false, skip = false;
    for (; at < argc && strncmp(argv[at], "--", 2) == 0; at++) {
        special = special || strcmp(argv[at], "--special") == 0;
        decode = decode || strncmp(argv[at], "--decode", 8) == 0;
        skip = skip || strcmp(argv[at], "--decode-skip") == 0;
        if (strcmp(argv[at], "--time") == 0 && at + 1 < argc)
            rounds = (int)strtol(argv[++at], NULL, 10);
    }
    if (at >= argc) {
        fprintf(stderr, "usage: tokenize [--special|--decode|--decode-skip|--time N] TOKENIZER_JSON [FILE...]\n");
        return 2;
    }
    int rc = 0;
    if (moec_tokenizer_load(&t, argv[at], &err) != MOEC_OK || moec_encoder_new(&e, t, &err) != MOEC_OK) {
        print_error(&err);
        rc = 1;
    } else if (rounds > 0) {
        rc = time_files(t, rounds, argv + at + 1, argc - at - 1);
    } else {
        run_frames(e, t, special, decode, skip);
    }
    moec_encoder_free(e);
    moec_tokenizer_free(t);
    return rc;
}
