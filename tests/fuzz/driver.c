/* A small mutating driver for LLVMFuzzerTestOneInput, so that the fuzz targets run under any compiler and for a bounded
 * time. It first replays every seed, then mutates them. Each input is on disk before it is tried: after a crash the file
 * holds the culprit, and giving that file as the only argument repeats it.
 *
 *   fuzz_x [--seconds N] [--runs N] [--seed N] [--save FILE] [FILE or FOLDER]...      no --seconds, no --runs: replay only */
#include <dirent.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { SEEDS_MAX = 4096, SEED_BYTES_MAX = 1 << 20, GROWTH = 1 << 12, HANG_SECONDS = 60 };

typedef struct input {
    uint8_t *data;
    size_t size;
} input;

static struct fuzz {
    input seed[SEEDS_MAX];
    size_t n_seeds, cap; /* cap: size of the mutation buffer */
    uint64_t random;
    int save_fd;
    const char *save_path;
    unsigned long runs;
    double slowest;
} fuzz = {.save_fd = -1};

static void die(const char *what)
{
    perror(what);
    exit(2);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* splitmix64 */
static uint64_t next(void)
{
    uint64_t z = (fuzz.random += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

static size_t below(size_t n)
{
    return n ? (size_t)(next() % n) : 0;
}

/* --- seeds -------------------------------------------------------------------------------------------------------- */

static void add_file(const char *path)
{
    struct stat s;
    if (stat(path, &s) != 0)
        die(path);
    if (!S_ISREG(s.st_mode) || s.st_size > SEED_BYTES_MAX || fuzz.n_seeds >= SEEDS_MAX)
        return;
    FILE *f = fopen(path, "rb");
    input in = {malloc((size_t)s.st_size + 1), 0};
    if (!f || !in.data)
        die(path);
    in.size = fread(in.data, 1, (size_t)s.st_size, f);
    fclose(f);
    fuzz.seed[fuzz.n_seeds++] = in;
}

static void add_path(const char *path)
{
    struct dirent **names;
    struct stat s;
    if (stat(path, &s) != 0) {
        fprintf(stderr, "%s: no such seeds, starting from nothing\n", path);
        return;
    }
    if (!S_ISDIR(s.st_mode)) {
        add_file(path);
        return;
    }
    int n = scandir(path, &names, NULL, alphasort); /* sorted, so that a seed number means the same run everywhere */
    if (n < 0)
        die(path);
    for (int i = 0; i < n; i++) {
        char full[4096];
        if (names[i]->d_name[0] != '.' && snprintf(full, sizeof full, "%s/%s", path, names[i]->d_name) < 4096)
            add_file(full);
        free(names[i]);
    }
    free(names);
}

/* --- mutations: each changes in->data within fuzz.cap ------------------------------------------------------------- */

static void open_gap(input *in, size_t at, size_t n)
{
    memmove(in->data + at + n, in->data + at, in->size - at);
    in->size += n;
}

static void insert(input *in, size_t at, const void *bytes, size_t n)
{
    if (n > fuzz.cap - in->size)
        return;
    open_gap(in, at, n);
    memcpy(in->data + at, bytes, n);
}

static void delete(input *in, size_t at, size_t n)
{
    memmove(in->data + at, in->data + at + n, in->size - at - n);
    in->size -= n;
}

static void flip_bit(input *in)
{
    if (in->size)
        in->data[below(in->size)] ^= (uint8_t)(1u << below(8));
}

static void set_byte(input *in)
{
    static const uint8_t odd[] = {0, 1, 0x7f, 0x80, 0xc0, 0xed, 0xff, '"', '{', '}', '[', ']', ',', ':', '-', '\\'};
    if (in->size)
        in->data[below(in->size)] = next() & 1 ? odd[below(sizeof odd)] : (uint8_t)next();
}

static void insert_random(input *in)
{
    uint8_t bytes[16];
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (uint8_t)next();
    insert(in, below(in->size + 1), bytes, 1 + below(sizeof bytes));
}

static void delete_range(input *in)
{
    if (!in->size)
        return;
    size_t at = below(in->size), most = in->size - at;
    delete(in, at, 1 + below(next() & 3 && most > 16 ? 16 : most));
}

static void repeat_range(input *in)
{
    uint8_t bytes[256];
    if (!in->size)
        return;
    size_t at = below(in->size), n = 1 + below(in->size - at < sizeof bytes ? in->size - at : sizeof bytes);
    memcpy(bytes, in->data + at, n);
    for (size_t times = 1 + below(8), to = below(in->size + 1); times > 0; times--)
        insert(in, to, bytes, n);
}

/* Front of this input, back of another. */
static void join_other(input *in)
{
    const input *other = &fuzz.seed[below(fuzz.n_seeds)];
    size_t at = below(in->size + 1), from = below(other->size + 1), n = other->size - from;
    if (n > fuzz.cap - at)
        n = fuzz.cap - at;
    memcpy(in->data + at, other->data + from, n);
    in->size = at + n;
}

/* One run of digits becomes another number. */
static void swap_number(input *in)
{
    static const char *const numbers[] = {
        "0", "1", "-1", "2", "7", "8", "255", "256", "65536", "2147483647", "2147483648", "4294967295", "4294967296",
        "9223372036854775807", "9223372036854775808", "-9223372036854775808", "18446744073709551615",
        "18446744073709551616", "1e999", "1.5", "0.0", "1e-400", "4611686018427387904", "99999999999999999999999999"};
    size_t at = below(in->size + 1), n = 0;
    while (at < in->size && (in->data[at] < '0' || in->data[at] > '9'))
        at++;
    while (at + n < in->size && in->data[at + n] >= '0' && in->data[at + n] <= '9')
        n++;
    if (n == 0)
        return;
    const char *number = numbers[below(sizeof numbers / sizeof *numbers)];
    delete(in, at, n);
    insert(in, at, number, strlen(number));
}

static void insert_token(input *in)
{
    static const char *const tokens[] = {
        "null", "true", "false", "{}", "[]", "\"\"", "\"a\":1,", "{\"a\":", "[[[[[[[[", "]]]]]]]]", "\\u0000", "\\ud800",
        "\\", "\"", ",", ":", "\xef\xbb\xbf", "\xf4\x90\x80\x80", "\"__metadata__\":{\"k\":\"v\"},", "\"dtype\":\"BF16\"",
        "\"shape\":[0]", "\"shape\":[4294967296,4294967296]", "\"data_offsets\":[0,0]", "..", "/", "%s%n", "\n", " "};
    const char *token = tokens[below(sizeof tokens / sizeof *tokens)];
    insert(in, below(in->size + 1), token, strlen(token));
}

/* Binary lengths: eight bytes in a row, little endian, mostly near the input's own size. */
static void set_length(input *in)
{
    if (in->size < 8)
        return;
    uint64_t v = next() & 3 ? in->size - 8 + next() % 17 - 8 : next() >> below(64);
    size_t at = next() & 3 ? 0 : below(in->size - 7);
    for (size_t i = 0; i < 8; i++)
        in->data[at + i] = (uint8_t)(v >> (8 * i));
}

/* The first eight bytes taken as a length are moved along with what the other mutations inserted or deleted, else no
 * mutant of a length-prefixed format would get past its first check. */
static void mutate(input *in)
{
    static void (*const all[])(input *) = {flip_bit,   set_byte, insert_random, delete_range, repeat_range, join_other,
                                           swap_number, swap_number, insert_token, insert_token, set_length};
    uint64_t prefix = 0;
    size_t before = in->size;
    for (size_t i = 0; i < 8 && in->size >= 8; i++)
        prefix |= (uint64_t)in->data[i] << (8 * i);
    for (size_t times = 1 + below(5); times > 0; times--)
        all[below(sizeof all / sizeof *all)](in);
    if (prefix > before || in->size < 8 || (next() & 3) == 0)
        return;
    prefix += in->size - before;
    for (size_t i = 0; i < 8; i++)
        in->data[i] = (uint8_t)(prefix >> (8 * i));
}

/* --- running ------------------------------------------------------------------------------------------------------ */

static void try(const uint8_t *data, size_t size)
{
    if (fuzz.save_fd >= 0 && (pwrite(fuzz.save_fd, data, size, 0) != (ssize_t)size ||
                              ftruncate(fuzz.save_fd, (off_t)size) != 0))
        die(fuzz.save_path);
    uint8_t *copy = malloc(size ? size : 1); /* exactly as long as the input, so that a read behind it is seen */
    if (!copy)
        die("input");
    memcpy(copy, data, size);
    alarm(HANG_SECONDS);
    double began = now();
    LLVMFuzzerTestOneInput(copy, size);
    double took = now() - began;
    alarm(0);
    free(copy);
    if (took > fuzz.slowest)
        fuzz.slowest = took;
    fuzz.runs++;
}

static void run(double seconds, unsigned long runs)
{
    double end = now() + seconds;
    for (size_t i = 0; i < fuzz.n_seeds; i++)
        try(fuzz.seed[i].data, fuzz.seed[i].size);
    unsigned long replayed = fuzz.runs;
    input in = {malloc(fuzz.cap), 0};
    if (!in.data)
        die("input");
    while ((runs && fuzz.runs - replayed < runs) || (seconds > 0 && now() < end)) {
        const input *from = &fuzz.seed[below(fuzz.n_seeds)];
        memcpy(in.data, from->data, from->size);
        in.size = from->size;
        mutate(&in);
        try(in.data, in.size);
    }
    free(in.data);
}

static double number(const char *text)
{
    char *end;
    double v = text ? strtod(text, &end) : -1;
    if (!text || *end != '\0' || v < 0) {
        fprintf(stderr, "'%s' is not a number\n", text ? text : "");
        exit(2);
    }
    return v;
}

int main(int argc, char **argv)
{
    double seconds = 0, runs = 0, began = now();
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--seconds") == 0)
            seconds = number(argv[++i]);
        else if (strcmp(argv[i], "--runs") == 0)
            runs = number(argv[++i]);
        else if (strcmp(argv[i], "--seed") == 0)
            fuzz.random = (uint64_t)number(argv[++i]);
        else if (strcmp(argv[i], "--save") == 0 && i + 1 < argc)
            fuzz.save_path = argv[++i];
        else
            add_path(argv[i]);
    }
    if (fuzz.n_seeds == 0)
        fuzz.seed[fuzz.n_seeds++] = (input){calloc(1, 1), 0};
    for (size_t i = 0; i < fuzz.n_seeds; i++)
        if (fuzz.cap < fuzz.seed[i].size + GROWTH)
            fuzz.cap = fuzz.seed[i].size + GROWTH;
    if (fuzz.save_path && (fuzz.save_fd = open(fuzz.save_path, O_WRONLY | O_CREAT | O_TRUNC, 0666)) < 0)
        die(fuzz.save_path);
    run(seconds, (unsigned long)runs);
    if (fuzz.save_fd >= 0) { /* nothing crashed */
        close(fuzz.save_fd);
        unlink(fuzz.save_path);
    }
    printf("%lu runs over %zu seeds in %.1f s, slowest %.3f s\n", fuzz.runs, fuzz.n_seeds, now() - began, fuzz.slowest);
    for (size_t i = 0; i < fuzz.n_seeds; i++)
        free(fuzz.seed[i].data);
    return 0;
}
