/* check.c - the rules of ptst.h that a machine can check.

       cc -O1 -o check tools/check.c && ./check            (from the top folder)

   Sections: every tag of the table of contents has a banner, in that order; every test file that
   a comment names exists. Text: ASCII, at most 100 columns, no tabs, no trailing blanks, no
   unfinished marks. Functions: at most 60 lines. Library rules: no call of malloc, free, printf,
   exit, abort or fopen outside >>platform and >>core. Prints one line per finding and exits with
   1 if there is any. (Mutable globals are found in the object file by tests/run.sh.) */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINE = 4096, SECTIONS = 64, FUNCTION_LINES = 60, COLUMNS = 100 };

static int findings;

static void finding(const char *file, int line, const char *what, const char *detail) {
    printf("%s:%d: %s%s%s\n", file, line, what, *detail ? ": " : "", detail);
    findings++;
}

/* Does the line call the function `word`? Comments and strings are cut off beforehand. */
static int calls(const char *line, const char *word) {
    const char *p = line;
    size_t n = strlen(word);
    while ((p = strstr(p, word)) != NULL) {
        int before = p == line ? ' ' : p[-1];
        const char *q = p + n;
        while (*q == ' ') {
            q++;
        }
        if (!isalnum(before) && before != '_' && before != '.' && before != '>' && *q == '(') {
            return 1;
        }
        p += n;
    }
    return 0;
}

/* Copies line without comments, string and character contents. in_comment survives the line. */
static void code_only(const char *line, char *out, int *in_comment) {
    char quote = 0;
    for (; *line; line++) {
        if (*in_comment) {
            if (line[0] == '*' && line[1] == '/') {
                *in_comment = 0;
                line++;
            }
        } else if (quote) {
            if (*line == '\\' && line[1]) {
                line++;
            } else if (*line == quote) {
                quote = 0;
            }
        } else if (line[0] == '/' && line[1] == '*') {
            *in_comment = 1;
            line++;
        } else if (line[0] == '/' && line[1] == '/') {
            break;
        } else if (*line == '"' || *line == '\'') {
            quote = *line;
        } else {
            *out++ = *line;
        }
    }
    *out = 0;
}

static void check_text(const char *file, int number, const char *line) {
    static const char *const marks[] = {"TO" "DO", "FIX" "ME", "XX" "X:", "HA" "CK"};
    size_t i, n = strlen(line);
    if (n > COLUMNS) {
        finding(file, number, "longer than 100 columns", "");
    }
    if (n != 0 && (line[n - 1] == ' ' || line[n - 1] == '\t')) {
        finding(file, number, "blank at the end of the line", "");
    }
    for (i = 0; i < n; i++) {
        if ((unsigned char)line[i] >= 0x80 || line[i] == '\t') {
            finding(file, number, "a tab or a byte that is not ASCII", "");
            break;
        }
    }
    for (i = 0; i < sizeof marks / sizeof marks[0]; i++) {
        if (strstr(line, marks[i]) != NULL) {
            finding(file, number, "unfinished mark", marks[i]);
        }
    }
}

/* ---- sections ---- */

static char contents[SECTIONS][32];
static int contents_count, banners;

/* ">>name" at p; 0 if there is none. */
static int tag_at(const char *p, char name[32]) {
    int n = 0;
    if (p[0] != '>' || p[1] != '>') {
        return 0;
    }
    for (p += 2; isalpha((unsigned char)*p) && n < 31; p++) {
        name[n++] = *p;
    }
    name[n] = 0;
    return n;
}

static int exists(const char *path) {
    FILE *f = fopen(path, "r");
    if (f != NULL) {
        fclose(f);
    }
    return f != NULL;
}

/* Every "tests/test_<x>.c" that a comment names must exist. */
static void check_test_names(const char *file, int number, const char *line) {
    const char *p = line;
    char path[128];
    while ((p = strstr(p, "tests/test_")) != NULL) {
        size_t n = 0;
        while (p[n] && (isalnum((unsigned char)p[n]) || strchr("_/.", p[n]) != NULL) &&
               n < sizeof path - 1) {
            path[n] = p[n];
            n++;
        }
        while (n > 0 && path[n - 1] == '.') {
            n--;
        }
        path[n] = 0;
        if (n > 2 && strcmp(path + n - 2, ".c") == 0 && !exists(path)) {
            finding(file, number, "names a test file that does not exist", path);
        }
        p += n;
    }
}

static void check_banner(const char *file, int number, const char *line) {
    char name[32];
    if (strncmp(line, "       >>", 9) == 0 && banners <= 1 && tag_at(line + 7, name)) {
        if (contents_count < SECTIONS) {
            strcpy(contents[contents_count++], name);
        }
        return;
    }
    if ((strncmp(line, "/* >>", 5) != 0 && strncmp(line, "   >>", 5) != 0) ||
        strstr(line, "====") == NULL || !tag_at(line + 3, name)) {
        return;
    }
    if (banners > 0 && (banners >= contents_count || strcmp(contents[banners], name) != 0)) {
        finding(file, number, "banner is not the next one of the table of contents", name);
    }
    banners++;
}

/* ---- functions ---- */

/* A function opens with a line that ends in '{' and belongs to a head that began in column 1
   with a name, and closes with '}' in column 1. */
static void check_function(const char *file, int number, const char *line, int *start,
                           int *head) {
    size_t n = strlen(line);
    int word = isalpha((unsigned char)line[0]) || line[0] == '_';
    if (word && strncmp(line, "typedef", 7) != 0 && strncmp(line, "struct", 6) != 0 &&
        strncmp(line, "enum", 4) != 0 && strchr(line, '(') != NULL && strchr(line, '=') == NULL) {
        *head = number;
    }
    if (n != 0 && line[n - 1] == ';' && *start == 0) {
        *head = 0;
    }
    if (*start == 0 && *head != 0 && n > 0 && line[n - 1] == '{') {
        *start = number;
    }
    if (strcmp(line, "}") == 0) {
        if (*start != 0 && number - *start > FUNCTION_LINES) {
            char what[64];
            snprintf(what, sizeof what, "%d lines", number - *start);
            finding(file, *start, "function is longer than 60 lines", what);
        }
        *start = *head = 0;
    }
}

static void check_calls(const char *file, int number, const char *code, const char *section) {
    static const char *const words[] = {"malloc",  "calloc", "realloc", "free", "fopen",
                                        "printf",  "exit",   "abort",   "puts", "assert",
                                        "sprintf", "strcpy", "strcat",  "atoi", "strtok"};
    size_t i;
    for (i = 0; i < sizeof words / sizeof words[0]; i++) {
        int low = i < 5 && (strcmp(section, "core") == 0 || strcmp(section, "platform") == 0);
        if (!low && calls(code, words[i])) {
            finding(file, number, "a call that the library may not make here", words[i]);
        }
    }
}

static void check_header(const char *file) {
    char line[LINE], code[LINE], section[32] = "", name[32];
    int number = 0, in_comment = 0, start = 0, head = 0;
    FILE *in = fopen(file, "r");
    if (in == NULL) {
        finding(file, 0, "cannot be read", "");
        return;
    }
    while (fgets(line, sizeof line, in) != NULL) {
        line[strcspn(line, "\n")] = 0;
        number++;
        check_text(file, number, line);
        check_banner(file, number, line);
        check_test_names(file, number, line);
        if (strncmp(line, "/* >>", 5) == 0 && tag_at(line + 3, name)) {
            strcpy(section, name);
        }
        code_only(line, code, &in_comment);
        check_function(file, number, line, &start, &head);
        check_calls(file, number, code, section);
    }
    fclose(in);
    if (banners != contents_count) {
        finding(file, number, "the table of contents and the banners differ in number", "");
    }
}

int main(int argc, char **argv) {
    check_header(argc > 1 ? argv[1] : "ptst.h");
    printf("%d findings\n", findings);
    return findings != 0;
}
