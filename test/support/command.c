/* SPDX-License-Identifier: MIT */
#include "support/command.h"

#include "support/test.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static char *read_back(FILE *file)
{
    char *text = malloc(COMMAND_OUTPUT_MAX + 1);
    assert_non_null(text);
    rewind(file);
    size_t n = fread(text, 1, COMMAND_OUTPUT_MAX, file);
    text[n] = 0;
    fclose(file);
    return text;
}

command_result command_run(const char *const *argv)
{
    FILE *out = tmpfile(), *err = tmpfile();
    assert_non_null(out);
    assert_non_null(err);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        dup2(fileno(out), STDOUT_FILENO);
        dup2(fileno(err), STDERR_FILENO);
        alarm(60);
        execvp(argv[0], (char *const *)argv);
        _exit(127);
    }
    int status = 0;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    command_result result;
    result.code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    result.out = read_back(out);
    result.err = read_back(err);
    return result;
}

command_result command_line(const char *line)
{
    char words[4096];
    const char *argv[64];
    int argc = 0;
    assert_true(strlen(line) < sizeof words);
    strcpy(words, line);
    for (char *word = strtok(words, " "); word && argc < 63; word = strtok(NULL, " "))
        argv[argc++] = word;
    argv[argc] = NULL;
    if (argc > 0 && strcmp(argv[0], "entrepot") == 0)
        argv[0] = EP_COMMAND;
    return command_run(argv);
}

void command_free(command_result *result)
{
    free(result->out);
    free(result->err);
}

/* -------------------------------------------------------------------- JSON */

static const char *blanks(const char *p)
{
    return p + strspn(p, " \t\n\r");
}

static const char *skip_value(const char *p);

static const char *skip_string(const char *p)
{
    if (*p++ != '"')
        return NULL;
    while (*p != '"') {
        if ((unsigned char)*p < 0x20)
            return NULL;
        if (*p == '\\' && !strchr("\"\\/bfnrtu", *++p))
            return NULL;
        p++;
    }
    return p + 1;
}

static const char *skip_number(const char *p)
{
    char *end;
    if (!isdigit((unsigned char)p[0]) && p[0] != '-')
        return NULL;
    if (p[0] == '0' && isalnum((unsigned char)p[1]))
        return NULL;
    double value = strtod(p, &end);
    return end == p || !isfinite(value) ? NULL : end;
}

static const char *skip_members(const char *p, char close)
{
    p = blanks(p + 1);
    if (*p == close)
        return p + 1;
    for (;;) {
        if (close == '}') {
            p = skip_string(p);
            if (!p || *(p = blanks(p)) != ':')
                return NULL;
            p = blanks(p + 1);
        }
        p = skip_value(p);
        if (!p)
            return NULL;
        p = blanks(p);
        if (*p == close)
            return p + 1;
        if (*p != ',')
            return NULL;
        p = blanks(p + 1);
    }
}

/* What follows the value at p; NULL when there is none. */
static const char *skip_value(const char *p)
{
    static const char *const words[] = {"true", "false", "null"};
    if (*p == '{' || *p == '[')
        return skip_members(p, *p == '{' ? '}' : ']');
    if (*p == '"')
        return skip_string(p);
    for (int i = 0; i < 3; i++) {
        if (strncmp(p, words[i], strlen(words[i])) == 0)
            return p + strlen(words[i]);
    }
    return skip_number(p);
}

bool json_is_one_value(const char *text)
{
    const char *end = skip_value(text);
    return end && strcmp(end, "\n") == 0;
}

double json_number(const char *text, const char *key)
{
    char quoted[128];
    double value = NAN;
    snprintf(quoted, sizeof quoted, "\"%s\": ", key);
    const char *found = strstr(text, quoted);
    if (found && sscanf(found + strlen(quoted), "%lf", &value) != 1)
        value = NAN;
    return value;
}
