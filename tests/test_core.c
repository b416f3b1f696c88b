/* Tests of >>platform, >>core, >>threads and >>random. */
#include "test.h"
#include <sys/wait.h>

static void core_errors(void) {
    ptst_ctx *c = test_open(1, NULL);
    CHECK(ptst_error_code(c) == PTST_OK);
    CHECK_TEXT(ptst_error_text(c), "");
    CHECK(ptst__fail(c, PTST_ERR_FORMAT, "%s: bad %d", "x.json", 7) == PTST_ERR_FORMAT);
    CHECK(ptst_error_code(c) == PTST_ERR_FORMAT);
    CHECK_TEXT(ptst_error_text(c), "x.json: bad 7");
    CHECK_TEXT(ptst_code_name(PTST_ERR_LIMIT), "ERR_LIMIT");
    CHECK_TEXT(ptst_code_name((ptst_code)999), "unknown");
    ptst_close(c);
    ptst_close(NULL);
}

static void core_open_refuses(void) {
    ptst_desc desc;
    ptst_ctx *c;
    memset(&desc, 0, sizeof desc);
    desc.simd = "mmx";
    CHECK(ptst_open(&desc, &c) == PTST_ERR_ARGUMENT);
    CHECK(c == NULL);
    desc.simd = "scalar";
    desc.threads = -1;
    CHECK(ptst_open(&desc, &c) == PTST_ERR_ARGUMENT);
}

static void core_checked_arithmetic(void) {
    size_t n;
    CHECK(ptst__mul(3, 4, &n) && n == 12);
    CHECK(ptst__mul(0, SIZE_MAX, &n) && n == 0);
    CHECK(!ptst__mul(SIZE_MAX, 2, &n));
    CHECK(!ptst__add(SIZE_MAX, 1, &n));
    CHECK(ptst__add(SIZE_MAX, 0, &n) && n == SIZE_MAX);
}

static void core_text_and_arena(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_text t = {NULL, 0, 0};
    ptst__arena a = {NULL};
    int i;
    char *first = ptst__arena_copy(c, &a, "first", 5);
    for (i = 0; i < 10000; i++) {
        char *p = (char *)ptst__arena_alloc(c, &a, (size_t)(i % 97) + 1, 3);
        CHECK(p != NULL && (uintptr_t)p % 16 == 0 && p[0] == 0);
        memset(p, 1, ((size_t)(i % 97) + 1) * 3);
        CHECK(ptst__text_add(c, &t, "ab") == PTST_OK);
    }
    CHECK_TEXT(first, "first");
    CHECK(t.size == 20000 && strlen(t.data) == 20000);
    CHECK(ptst__arena_alloc(c, &a, SIZE_MAX, 2) == NULL);
    ptst__arena_free(c, &a);
    ptst_text_free(c, &t);
    ptst_close(c);
}

static void core_map(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst__map m = {NULL, 0, 0};
    static char keys[5000][8];
    int i;
    for (i = 0; i < 5000; i++) {
        snprintf(keys[i], sizeof keys[i], "k%d", i);
        CHECK(ptst__map_put(c, &m, keys[i], strlen(keys[i]), i) == PTST_OK);
    }
    CHECK(ptst__map_put(c, &m, "k77", 3, -5) == PTST_OK);
    CHECK(m.count == 5000);
    for (i = 0; i < 5000; i++) {
        CHECK(ptst__map_get(&m, keys[i], strlen(keys[i]), -1) == (i == 77 ? -5 : i));
    }
    CHECK(ptst__map_get(&m, "none", 4, -9) == -9);
    CHECK(ptst__map_put(c, &m, "", 0, 3) == PTST_OK && ptst__map_get(&m, "", 0, 0) == 3);
    ptst__map_free(c, &m);
    ptst_close(c);
}

static void core_utf8(void) {
    char buffer[4];
    uint32_t point, back;
    for (point = 0; point < 0x110000; point++) {
        size_t n = ptst__utf8_write(buffer, point);
        size_t got = ptst__utf8_read(buffer, n, &back);
        if (point >= 0xD800 && point <= 0xDFFF) {
            CHECK(got == 0);
        } else if (got != n || back != point || (n > 1 && ptst__utf8_read(buffer, n - 1, &back))) {
            CHECK(false);
        }
    }
    CHECK(ptst__utf8_read("\xC0\x80", 2, &back) == 0);
    CHECK(ptst__utf8_read("\xF4\x90\x80\x80", 4, &back) == 0);
    CHECK(ptst__utf8_read("\x80", 1, &back) == 0);
}

static void core_numbers(void) {
    static const char *const cases[] = {"0",      "-0",        "1",        "0.1",
                                        "1e22",   "1e23",      "-2.5e-3",  "123456789012345678901",
                                        "5e-324", "1.7976931348623157e308", "1e400", "1e-400",
                                        "9007199254740993", "0.30000000000000004"};
    char buffer[32];
    size_t i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        double expected = strtod(cases[i], NULL);
        double got = ptst__number_read(cases[i], strlen(cases[i]));
        CHECK(memcmp(&got, &expected, sizeof got) == 0);
    }
    CHECK(ptst__number_text(buffer, 0.1) == 3);
    CHECK_TEXT(buffer, "0.1");
    ptst__number_text(buffer, 1.0 / 3);
    CHECK(strtod(buffer, NULL) == 1.0 / 3);
}

static void core_atomic_file(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_text text = {NULL, 0, 0};
    char path[] = "/tmp/ptst_test_XXXXXX", file[64];
    ptst__out o;
    CHECK(mkdtemp(path) != NULL);
    snprintf(file, sizeof file, "%s/a/b/file", path);
    CHECK(ptst__write_file(c, file, "x", 1) == PTST_ERR_NOT_FOUND);
    snprintf(file, sizeof file, "%s/a/b", path);
    CHECK(ptst__make_folders(c, file) == PTST_OK);
    snprintf(file, sizeof file, "%s/a/b/file", path);
    CHECK(ptst__write_file(c, file, "old", 3) == PTST_OK);
    CHECK(ptst__out_open(c, &o, file) == PTST_OK);
    CHECK(ptst__out_write(c, &o, "new and torn", 12) == PTST_OK);
    ptst__out_abort(c, &o);
    CHECK(ptst__read_file(c, file, &text) == PTST_OK);
    CHECK_TEXT(text.data, "old");
    CHECK(ptst__make_folders(c, file) == PTST_ERR_IO);
    CHECK(strstr(ptst_error_text(c), "a folder was expected") != NULL);
    unlink(file);
    snprintf(file, sizeof file, "%s/a/b", path);
    CHECK(rmdir(file) == 0); /* no temporary was left */
    snprintf(file, sizeof file, "%s/a", path);
    rmdir(file);
    rmdir(path);
    ptst_text_free(c, &text);
    ptst_close(c);
}

/* ---- threads ---- */

enum { CORE_TASKS = 10007 };

static void core_mark(void *arg, size_t task, int thread) {
    unsigned char *marks = (unsigned char *)arg;
    marks[task] = (unsigned char)(marks[task] + 1 + 0 * thread);
}

static void threads_each_task_once(void) {
    static unsigned char marks[CORE_TASKS];
    int threads, round;
    size_t i;
    for (threads = 1; threads <= 8; threads++) {
        ptst_ctx *c = test_open(threads, NULL);
        memset(marks, 0, sizeof marks);
        for (round = 0; round < 50; round++) {
            ptst__parallel_for(c, round % 2 ? CORE_TASKS : 3, core_mark, marks);
        }
        for (i = 0; i < CORE_TASKS; i++) {
            if (marks[i] != (i < 3 ? 50 : 25)) {
                CHECK(false);
                break;
            }
        }
        ptst_close(c);
    }
}

static void core_add(void *arg, size_t task, int thread) {
    uint64_t *sums = (uint64_t *)arg;
    (void)thread;
    sums[task] += task + 1;
}

/* Short operations one after the other, with more threads than cores, long pauses for some to fall
   asleep in between: each sees what the one before wrote. */
static void threads_in_order(void) {
    static uint64_t sums[64];
    ptst_ctx *c = test_open(7, NULL);
    size_t round, i, wrong = 0, tasks;
    memset(sums, 0, sizeof sums);
    for (round = 0; round < 3000; round++) {
        tasks = 2 + round % 63;
        if (round % 600 == 0) {
            ptst__nap(2);
        }
        ptst__parallel_for(c, tasks, core_add, sums);
        for (i = 0; i < tasks; i++) {
            wrong += sums[i] != i + 1;
            sums[i] = 0;
        }
    }
    CHECK(wrong == 0);
    ptst_close(c);
}

/* More tasks than an operation has room to count one by one. */
static void threads_many_tasks(void) {
    size_t count = ((size_t)1 << 24) + 7, i, wrong = 0;
    unsigned char *marks = (unsigned char *)calloc(count, 1);
    ptst_ctx *c = test_open(3, NULL);
    CHECK(marks != NULL);
    if (marks != NULL) {
        ptst__parallel_for(c, count, core_mark, marks);
    }
    for (i = 0; i < count && marks != NULL; i++) {
        wrong += marks[i] != 1;
    }
    CHECK(wrong == 0);
    free(marks);
    ptst_close(c);
}

#ifndef PTST_NO_THREADS
typedef struct core_wait {
    pthread_mutex_t lock;
    int done, early; /* tasks; whether the first one gave up waiting for the others */
} core_wait;

static int core_done(core_wait *w, int more) {
    int done;
    pthread_mutex_lock(&w->lock);
    done = w->done += more;
    pthread_mutex_unlock(&w->lock);
    return done;
}

/* The first task ends after all others, for which its thread has no time then. */
static void core_wait_for_others(void *arg, size_t task, int thread) {
    core_wait *w = (core_wait *)arg;
    int i;
    (void)thread;
    if (task != 0) {
        (void)core_done(w, 1);
    }
    for (i = 0; i < 20000 && task == 0 && core_done(w, 0) < 63; i++) {
        ptst__nap(1);
    }
    if (task == 0) {
        w->early = core_done(w, 0) < 63;
    }
}

/* A thread that is through with its own tasks does those of one that is not. */
static void threads_help(void) {
    ptst_ctx *c = test_open(2, NULL);
    core_wait w;
    int round;
    bool helped = true;
    pthread_mutex_init(&w.lock, NULL);
    for (round = 0; round < 20 && helped && ptst_thread_count(c) == 2; round++) {
        w.done = w.early = 0;
        ptst__parallel_for(c, 64, core_wait_for_others, &w);
        helped = w.done == 63 && w.early == 0;
        CHECK(helped);
    }
    pthread_mutex_destroy(&w.lock);
    ptst_close(c);
}
#endif

/* ---- random ---- */

/* Known answers of philox4x32-10 from the Random123 distribution (kat_vectors). */
static void random_known_answers(void) {
    uint32_t x[4] = {0, 0, 0, 0};
    uint32_t y[4] = {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344};
    ptst__philox(x, 0, 0);
    CHECK(x[0] == 0x6627e8d5 && x[1] == 0xe169c58d && x[2] == 0xbc57ac4c && x[3] == 0x9b00dbd8);
    ptst__philox(y, 0xa4093822, 0x299f31d0);
    CHECK(y[0] == 0xd16cfe09 && y[1] == 0x94fdcceb && y[2] == 0x5001e420 && y[3] == 0x24126ea1);
}

static void random_moments(void) {
    ptst_rng r = {42, 7, 0};
    double sum = 0, squares = 0, count[6] = {0, 0, 0, 0, 0, 0};
    int i, n = 100000;
    for (i = 0; i < n; i++) {
        double v = ptst_rng_normal(&r);
        sum += v;
        squares += v * v;
        count[ptst_rng_below(&r, 6)] += 1;
    }
    CHECK_NEAR(sum / n, 0, 0.015);     /* 4.7 standard errors */
    CHECK_NEAR(squares / n, 1, 0.02);  /* the same */
    for (i = 0; i < 6; i++) {
        CHECK_NEAR(count[i] / n, 1.0 / 6, 0.006);
    }
    CHECK(ptst_rng_below(&r, 0) == 0 && ptst_rng_below(&r, 1) == 0);
}

/* FIPS 180-4 examples, and a text in pieces of all sizes. */
static void core_sha256(void) {
    static const struct {
        const char *text, *hash;
    } cases[] = {
        {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"}};
    ptst__sha256 h;
    char text[65], whole[300];
    size_t i, k;
    for (i = 0; i < 3; i++) {
        ptst__sha256_start(&h);
        ptst__sha256_add(&h, cases[i].text, strlen(cases[i].text));
        ptst__sha256_end(&h, text);
        CHECK_TEXT(text, cases[i].hash);
    }
    memset(whole, 'a', sizeof whole);
    ptst__sha256_start(&h);
    for (i = 0; i < 1000000; i += k) { /* a million times 'a' */
        k = i % 299 + 1 < 1000000 - i ? i % 299 + 1 : 1000000 - i;
        ptst__sha256_add(&h, whole, k);
    }
    ptst__sha256_end(&h, text);
    CHECK_TEXT(text, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

/* A pipe gives less than what is asked for, and has no size; what comes is appended. */
static void core_read_pipe(void) {
    char folder[] = "/tmp/ptst_test_XXXXXX", path[64];
    ptst_ctx *c = test_open(1, NULL);
    ptst_text text = {NULL, 0, 0};
    size_t i, bad = 0, size = 300000;
    int status = 1;
    pid_t child;
    CHECK(mkdtemp(folder) != NULL);
    snprintf(path, sizeof path, "%s/pipe", folder);
    CHECK(mkfifo(path, 0600) == 0);
    child = fork();
    if (child == 0) { /* writes in pieces of 1000 bytes */
        char bytes[1000];
        int fd = open(path, O_WRONLY);
        for (i = 0; i < size; i++) {
            bytes[i % 1000] = (char)(i % 251);
            if (i % 1000 == 999 && write(fd, bytes, 1000) != 1000) {
                _exit(1);
            }
        }
        _exit(0);
    }
    CHECK(ptst_text_append(c, &text, "head", 4) == PTST_OK);
    CHECK(child > 0 && ptst__read_file(c, path, &text) == PTST_OK);
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(text.size == 4 + size && memcmp(text.data, "head", 4) == 0 && text.data[text.size] == 0);
    for (i = 0; i + 4 < text.size; i++) {
        bad += text.data[4 + i] != (char)(i % 251);
    }
    CHECK(bad == 0);
    ptst_text_free(c, &text);
    CHECK(unlink(path) == 0 && rmdir(folder) == 0);
    ptst_close(c);
}

static void core_append_and_finite(void) {
    char folder[] = "/tmp/ptst_test_XXXXXX", path[64];
    ptst_ctx *c = test_open(1, NULL);
    ptst_text text = {NULL, 0, 0};
    int lock, second, pipe;
    char bytes[4];
    CHECK(mkdtemp(folder) != NULL);
    snprintf(path, sizeof path, "%s/log", folder);
    CHECK(ptst__append_file(c, path, "a\n", 2, false) == PTST_OK);
    CHECK(ptst__append_file(c, path, "b\n", 2, false) == PTST_OK);
    CHECK(ptst__read_file(c, path, &text) == PTST_OK);
    CHECK_TEXT(text.data, "a\nb\n");
    text.size = 0;
    CHECK(ptst__append_file(c, path, "c\n", 2, true) == PTST_OK);
    CHECK(ptst__read_file(c, path, &text) == PTST_OK);
    CHECK_TEXT(text.data, "c\n");
    CHECK(ptst__append_file(c, folder, "x", 1, false) == PTST_ERR_IO);
    snprintf(path, sizeof path, "%s/pipe", folder); /* a pipe stays a pipe */
    CHECK(mkfifo(path, 0600) == 0);
    pipe = open(path, O_RDWR);
    CHECK(ptst__write_file(c, path, "abc", 3) == PTST_OK && ptst__path_is_device(path));
    CHECK(ptst__append_file(c, path, "d", 1, true) == PTST_OK);
    CHECK(read(pipe, bytes, 4) == 4 && memcmp(bytes, "abcd", 4) == 0);
    close(pipe);
    unlink(path);
    snprintf(path, sizeof path, "%s/log", folder);
    if (ptst__path_is_device("/dev/full")) {
        CHECK(ptst__append_file(c, "/dev/full", "x", 1, false) == PTST_ERR_IO);
        CHECK(ptst__write_file(c, "/dev/full", "x", 1) == PTST_ERR_IO);
        CHECK(ptst__path_is_device("/dev/full"));
    }
    ptst_text_free(c, &text);
    CHECK(ptst__remove_file(c, path) == PTST_OK && ptst__remove_file(c, path) == PTST_OK);
    CHECK(ptst__remove_file(c, folder) == PTST_ERR_IO);
    CHECK(ptst__folder_lock(c, folder, &lock) == PTST_OK);
    CHECK(ptst__folder_lock(c, folder, &second) == PTST_ERR_IO && second == -1);
    ptst__folder_unlock(lock);
    CHECK(ptst__folder_lock(c, folder, &second) == PTST_OK);
    ptst__folder_unlock(second);
    CHECK(ptst__folder_lock(c, path, &second) == PTST_ERR_NOT_FOUND);
    CHECK(rmdir(folder) == 0);
    CHECK(ptst__finite(0) && ptst__finite(-1e308) && ptst__finite(4e-324));
    CHECK(!ptst__finite(HUGE_VAL) && !ptst__finite(-HUGE_VAL) &&
          !ptst__finite((double)ptst__float_of(0x7FC00000u)));
    ptst_close(c);
}

static void suite_core(void) {
    RUN(core_errors);
    RUN(core_open_refuses);
    RUN(core_checked_arithmetic);
    RUN(core_text_and_arena);
    RUN(core_map);
    RUN(core_utf8);
    RUN(core_numbers);
    RUN(core_atomic_file);
    RUN(core_sha256);
    RUN(core_read_pipe);
    RUN(core_append_and_finite);
    RUN(threads_each_task_once);
    RUN(threads_in_order);
    if (getenv("TEST_QUICK") == NULL) { /* a minute under the thread sanitizer */
        RUN(threads_many_tasks);
    }
#ifndef PTST_NO_THREADS
    RUN(threads_help);
#endif
    RUN(random_known_answers);
    RUN(random_moments);
}

MAIN(core)
