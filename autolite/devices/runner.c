/* What runs on a phone, which has no Python: runner.py in C, for a libonnxruntime.so that lies beside it.
 *
 *     runner version
 *     runner time < SPEC
 *     runner memory < SPEC
 *     runner outputs < SPEC
 *
 * A specification is lines of a word and its value; autolite/devices/phone.py writes it, and the files of inputs.
 * Answers are lines of JSON, the same as those of runner.py: rounds, bursts and their order are those of rounds.py, and
 * sessions are opened as in runtime/session.py. Whoever changes one of these has to change this file too. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

/* Functions of ONNX Runtime by their places in its table, OrtApi of onnxruntime_c_api.h, to which later versions only
 * append ("Size of version 1 API cannot change", onnxruntime_c_api.cc); so no header is needed to build this. */
enum {
    GetErrorMessage = 2, CreateEnv = 3, CreateSession = 7, Run = 9, CreateSessionOptions = 10,
    SetSessionExecutionMode = 13, SetSessionLogSeverityLevel = 22, SetIntraOpNumThreads = 24, SetInterOpNumThreads = 25,
    SessionGetInputCount = 30, SessionGetInputName = 36, SessionGetOutputName = 37,
    CreateTensorWithDataAsOrtValue = 49, GetTensorMutableData = 51, GetTensorElementType = 60, GetDimensionsCount = 61,
    GetDimensions = 62, GetTensorTypeAndShape = 65, CreateCpuMemoryInfo = 69, GetAllocatorWithDefaultOptions = 78,
    ReleaseValue = 96, ReleaseTensorTypeAndShapeInfo = 99, ReleaseSessionOptions = 100, AddSessionConfigEntry = 130,
};
#define ORT(function, ...) ((void *(*)(__VA_ARGS__))api[function])
#define RELEASE(function, what) ((void (*)(void *))api[function])(what)
enum { API_VERSION = 8, FATAL = 4, SEQUENTIAL = 0, DEVICE_ALLOCATOR = 0, DEFAULT_MEMORY = 0 };
enum { FLOAT = 1, UINT8, INT8, UINT16, INT16, INT32, INT64, BOOL = 9, DOUBLE = 11, UINT32, UINT64 };

enum { MOST_RANK = 8, LONGEST_NAME = 4096, BURST_NS = 5000000, BURST_CALLS = 50, MEMORY_CALLS = 3 };
enum { WAITING = 5, GRACE = 5, LOOK = 1, ASK = 5 }; /* seconds */
static const int64_t SECOND = 1000000000;            /* of nanoseconds */

typedef struct {
    char *name, *file, *inputs; /* the name is JSON already */
    void *session;
    size_t takes;
    char **input_names, *output_name; /* of the first: others, such as a cache, need not be given */
    void **values, *output;
} Model;

static void *const *api;
static void *environment;
static char folder[PATH_MAX]; /* where this program is */
static Model *models;
static size_t count;
static long threads = 1, exact = 1, lock, replaces, min_rounds = 5, first;
static double seconds, warmup;
static const char *cores; /* any, if there is nothing */
static int fixed;
static volatile sig_atomic_t stopped;

static void fix_performance(int on) {
    fixed = on; /* phones that have no such mode say so, to nobody */
    if (system(on ? "cmd power set-fixed-performance-mode-enabled true >/dev/null 2>&1"
                  : "cmd power set-fixed-performance-mode-enabled false >/dev/null 2>&1") != 0)
        return;
}

static void leave(int code) { /* what was said is written already: where nobody reads, writing does not end */
    if (fixed)
        fix_performance(0);
    _exit(code); /* not exit: the threads of sessions still are there */
}

static void end_line(void) {
    putchar('\n');
    if (fflush(stdout) || stopped) /* nobody reads any more, or this is to end */
        leave(1);
}

static void fail(const char *what, const char *which) {
    printf("{\"error\": \"");
    for (int part = 0; part < 2; part++)
        for (const unsigned char *c = (const unsigned char *)(part ? which : what); *c && *c != '\n'; c++) {
            if (*c == '"' || *c == '\\')
                putchar('\\');
            putchar(*c < ' ' ? ' ' : *c);
        }
    printf("\"}");
    end_line();
    leave(1);
}

static void check(void *status) {
    if (status)
        fail(((const char *(*)(void *))api[GetErrorMessage])(status), "");
}

static void *room(size_t number, size_t size) {
    void *found = calloc(number + 1, size);
    if (!found)
        fail("it has too little memory", "");
    return found;
}

static int64_t now(void) {
    struct timespec found;
    clock_gettime(CLOCK_MONOTONIC, &found);
    return (int64_t)found.tv_sec * SECOND + found.tv_nsec;
}

static long whole(const char *text) {
    char *end;
    errno = 0;
    long found = strtol(text, &end, 10);
    if (end == text || *end || errno)
        fail("no whole number: ", text);
    return found;
}

static double real(const char *text) {
    char *end;
    double found = strtod(text, &end);
    if (end == text || *end)
        fail("no number: ", text);
    return found;
}

static char *copied(const char *text) {
    return strcpy(room(strlen(text), 1), text);
}

static void pin(const char *text) {
    char *numbers = copied(text), sentence[512];
    cpu_set_t cores;
    CPU_ZERO(&cores);
    for (char *each = strtok(numbers, ","); each; each = strtok(NULL, ",")) {
        long number = whole(each);
        if (number >= 0 && number < CPU_SETSIZE)
            CPU_SET((size_t)number, &cores);
    }
    free(numbers);
    if (!sched_setaffinity(0, sizeof cores, &cores))
        return;
    snprintf(sentence, sizeof sentence, "it has no cores %s that can be used: ask for others", text);
    fail(sentence, "");
}

static void take(const char *word, const char *value) {
    static const struct {
        const char *word;
        long *to;
    } wholes[] = {{"threads", &threads},   {"exact", &exact},           {"lock", &lock},
                  {"replaces", &replaces}, {"min_rounds", &min_rounds}, {"first", &first}};
    Model *last = count ? &models[count - 1] : NULL;
    if (!strcmp(word, "model")) {
        models = realloc(models, (count + 1) * sizeof *models);
        if (!models)
            fail("it has too little memory", "");
        memset(&models[count], 0, sizeof *models);
        models[count++].name = copied(value);
    } else if (last && !strcmp(word, "file"))
        last->file = copied(value);
    else if (last && !strcmp(word, "inputs"))
        last->inputs = copied(value);
    else if (!strcmp(word, "cores"))
        cores = copied(value);
    else if (!strcmp(word, "seconds"))
        seconds = real(value);
    else if (!strcmp(word, "warmup"))
        warmup = real(value);
    else {
        size_t i = 0, known = sizeof wholes / sizeof *wholes;
        while (i < known && strcmp(word, wholes[i].word))
            i++;
        if (i == known)
            fail("a word of the specification is unknown: ", word);
        *wholes[i].to = whole(value);
    }
}

static void read_spec(void) {
    char *line = NULL;
    size_t size = 0;
    for (ssize_t length; (length = getline(&line, &size, stdin)) > 0;) {
        if (line[length - 1] == '\n')
            line[length - 1] = 0;
        char *value = strchr(line, ' ');
        if (!value)
            fail("a line of the specification is no word and value: ", line);
        *value++ = 0;
        take(line, value);
    }
    free(line);
    for (size_t i = 0; i < count; i++)
        if (!models[i].file || !models[i].inputs)
            fail("a model of the specification has no file or no inputs: ", models[i].name);
    if (!count)
        fail("the specification names no model", "");
}

static int is_runner(long process) {
    char path[64], said[PATH_MAX] = "";
    snprintf(path, sizeof path, "/proc/%ld/cmdline", process);
    FILE *file = fopen(path, "r");
    int found = file && fgets(said, sizeof said, file) && strstr(said, "runner");
    if (file)
        fclose(file);
    return found;
}

/* End a runner that waits for somebody who has gone. It is asked first, since it may have to take a mode back. */
static void end_other(long process) {
    if (process <= 1 || process == getpid() || !is_runner(process))
        return;
    kill((pid_t)process, SIGTERM);
    for (int look = 0; look < GRACE * 20 && is_runner(process); look++)
        usleep(50000);
    if (is_runner(process))
        kill((pid_t)process, SIGKILL);
}

static void be_alone(void) {
    char path[PATH_MAX + 32];
    snprintf(path, sizeof path, "%s/../timing.lock", folder);
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666); /* held until this process ends */
    if (file < 0)
        fail("cannot write ", path);
    while (flock(file, LOCK_EX | LOCK_NB)) {
        printf("{\"waiting\": true}"); /* a sign of life, and the end if nobody hears it */
        end_line();
        sleep(WAITING);
    }
}

static const char *load_runtime(void) {
    ssize_t length = readlink("/proc/self/exe", folder, sizeof folder - 1);
    folder[length > 0 ? length : 0] = 0;
    char *slash = strrchr(folder, '/'), path[PATH_MAX + 32];
    if (slash)
        *slash = 0;
    snprintf(path, sizeof path, "%s/libonnxruntime.so", folder);
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    typedef struct {
        void *const *(*GetApi)(uint32_t);
        const char *(*GetVersionString)(void);
    } Base;
    const Base *(*get_base)(void) = NULL;
    if (library)
        *(void **)&get_base = dlsym(library, "OrtGetApiBase");
    if (!get_base)
        fail("cannot load ONNX Runtime: ", dlerror());
    api = get_base()->GetApi(API_VERSION);
    if (!api)
        fail("this is an ONNX Runtime that cannot be used: ", get_base()->GetVersionString());
    check(ORT(CreateEnv, int, const char *, void **)(FATAL, "autolite", &environment));
    return get_base()->GetVersionString();
}

/* See autolite/saturation.py; what is known of the processor is enough here, where few are x86. */
static int saturates(void) {
#ifdef __x86_64__
    return !__builtin_cpu_supports("avx512vnni"); /* older compilers know no "avxvnni": exact there too, if slower */
#else
    return 0;
#endif
}

static void *try_session(const char *file, int precisely, void **session) {
    void *options, *failure;
    check(ORT(CreateSessionOptions, void **)(&options));
    check(ORT(SetIntraOpNumThreads, void *, int)(options, (int)threads));
    check(ORT(SetInterOpNumThreads, void *, int)(options, 1));
    check(ORT(SetSessionExecutionMode, void *, int)(options, SEQUENTIAL));
    check(ORT(SetSessionLogSeverityLevel, void *, int)(options, FATAL));
    void *(*set)(void *, const char *, const char *) = ORT(AddSessionConfigEntry, void *, const char *, const char *);
    check(set(options, "session.force_spinning_stop", "1"));
    check(set(options, "session.x64quantprecision", precisely ? "1" : "0"));
    failure = ORT(CreateSession, void *, const char *, void *, void **)(environment, file, options, session);
    RELEASE(ReleaseSessionOptions, options);
    return failure;
}

static void *opened(const char *file) {
    size_t length = strlen(file);
    int precisely = exact && saturates() && !(length > 4 && !strcmp(file + length - 4, ".ort"));
    void *session = NULL, *failure = try_session(file, precisely, &session);
    if (failure && !(precisely && !try_session(file, 0, &session)))
        check(failure);
    return session;
}

static void get(void *to, size_t bytes, FILE *file, const char *path) {
    if (fread(to, 1, bytes, file) != bytes)
        fail("broken inputs: ", path);
}

/* Read the inputs that a model takes; others that are in the file are not for it. */
static void read_inputs(Model *model) {
    void *memory = NULL;
    check(ORT(CreateCpuMemoryInfo, int, int, void **)(DEVICE_ALLOCATOR, DEFAULT_MEMORY, &memory));
    FILE *file = fopen(model->inputs, "rb");
    if (!file)
        fail("cannot read ", model->inputs);
    fseek(file, 0, SEEK_END);
    long total = ftell(file);
    rewind(file);
    uint32_t head[3]; /* bytes of the name, type, rank */
    while (fread(head, 1, sizeof head, file) == sizeof head) {
        int64_t dimensions[MOST_RANK];
        uint64_t bytes;
        if (head[0] == 0 || head[0] > LONGEST_NAME || head[2] > MOST_RANK)
            fail("broken inputs: ", model->inputs);
        get(dimensions, head[2] * sizeof *dimensions, file, model->inputs);
        get(&bytes, sizeof bytes, file, model->inputs);
        if (bytes > (uint64_t)total)
            fail("broken inputs: ", model->inputs);
        char *name = room(head[0], 1), *data = room((size_t)bytes, 1);
        get(name, head[0], file, model->inputs);
        get(data, (size_t)bytes, file, model->inputs);
        size_t i = 0;
        while (i < model->takes && strcmp(name, model->input_names[i]))
            i++;
        if (i < model->takes && !model->values[i]) /* it refers to the data, and checks that they are enough */
            check(ORT(CreateTensorWithDataAsOrtValue, void *, void *, size_t, const int64_t *, size_t, int, void **)(
                memory, data, (size_t)bytes, dimensions, head[2], (int)head[1], &model->values[i]));
        else
            free(data);
        free(name);
    }
    fclose(file);
    for (size_t i = 0; i < model->takes; i++)
        if (!model->values[i])
            fail("the model has an input that is not given: ", model->input_names[i]);
}

static void load_model(Model *model) {
    void *allocator;
    check(ORT(GetAllocatorWithDefaultOptions, void **)(&allocator));
    for (Model *other = models; other < model && !model->session; other++)
        if (!strcmp(other->file, model->file))
            model->session = other->session;
    if (!model->session)
        model->session = opened(model->file);
    check(ORT(SessionGetInputCount, void *, size_t *)(model->session, &model->takes));
    model->input_names = room(model->takes, sizeof(char *));
    model->values = room(model->takes, sizeof(void *));
    for (size_t i = 0; i < model->takes; i++)
        check(ORT(SessionGetInputName, void *, size_t, void *, char **)(model->session, i, allocator,
                                                                        &model->input_names[i]));
    check(ORT(SessionGetOutputName, void *, size_t, void *, char **)(model->session, 0, allocator, &model->output_name));
    read_inputs(model);
}

static void load_models(void) {
    for (size_t i = 0; i < count; i++)
        load_model(&models[i]);
}

static void forget(Model *model) {
    RELEASE(ReleaseValue, model->output);
    model->output = NULL;
}

static void run(Model *model) {
    check(ORT(Run, void *, void *, char **, void **, size_t, char **, size_t, void **)(
        model->session, NULL, model->input_names, model->values, model->takes, &model->output_name, 1,
        &model->output));
}

static void call(Model *model) {
    run(model);
    forget(model);
}

static double number_in(const char *path) {
    FILE *file = fopen(path, "r");
    double found = -1;
    if (file && fscanf(file, "%lf", &found) != 1)
        found = -1;
    if (file)
        fclose(file);
    return found;
}

/* The hottest of the sensors that Android tells of, for phones whose kernel does not let a shell read them. */
static double asked_celsius(void) {
    FILE *said = popen("dumpsys thermalservice 2>/dev/null", "r");
    char line[512];
    int current = 0;
    double value, found = -1;
    while (said && fgets(line, sizeof line, said)) {
        if (line[0] != ' ' && line[0] != '\t')
            current = !strncmp(line, "Current temperatures", 20);
        const char *at = current ? strstr(line, "{mValue=") : NULL;
        if (at && sscanf(at + 8, "%lf", &value) == 1 && value > found && value < 150)
            found = value;
    }
    if (said)
        pclose(said);
    return found;
}

/* Sensors may take milliseconds each, and asking Android tens of them, so this is done seldom. */
static double celsius(void) {
    static double hottest;
    static int64_t asked;
    if (asked && now() - asked < ASK * SECOND)
        return hottest;
    hottest = -1;
    for (int i = 0; i < 128; i++) {
        char path[64];
        snprintf(path, sizeof path, "/sys/class/thermal/thermal_zone%d/temp", i);
        double value = number_in(path) / 1000;
        if (value > hottest && value < 150)
            hottest = value;
    }
    if (hottest <= 0)
        hottest = asked_celsius();
    asked = now();
    return hottest;
}

static void tell_state(void) {
    char path[128];
    double hottest = celsius(), value;
    printf(hottest > 0 ? "{\"state\": {\"celsius\": %.1f" : "{\"state\": {\"celsius\": null", hottest);
    printf(", \"megahertz\": ");
    int told = 0;
    for (int i = 0; i < 64; i++) {
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/cpufreq/scaling_cur_freq", i);
        if ((value = number_in(path)) > 0)
            printf("%s%.0f", told++ ? ", " : "[", value / 1000);
    }
    printf(told ? "]}}" : "null}}");
    end_line();
}

static void burst(Model *model, long number) {
    double found[BURST_CALLS];
    int done = 0;
    call(model);
    int64_t began = now(), end = began;
    while (!done || (end - began < BURST_NS && done < BURST_CALLS)) {
        int64_t before = now();
        call(model);
        end = now();
        found[done++] = (double)(end - before) / 1e6;
    }
    printf("{\"round\": %ld, \"model\": %s, \"milliseconds\": [", number, model->name);
    for (int i = 0; i < done; i++)
        printf(i ? ", %.6f" : "%.6f", found[i]);
    printf("]}");
    end_line();
}

static void measure_time(const char *version) {
    load_models();
    printf("{\"runtime\": \"%s\", \"process\": %d}", version, (int)getpid());
    end_line();
    fix_performance(1);
    int64_t start = now(), looked = 0;
    for (size_t i = 0; i < count; i++) {
        int64_t began = now();
        do
            call(&models[i]);
        while ((double)(now() - began) < warmup * 1e9 && !stopped);
    }
    for (long done = first; done < min_rounds || (double)(now() - start) < seconds * 1e9; done++)
        for (size_t i = 0; i < count; i++) {
            burst(&models[((size_t)done + i) % count], done);
            if (!looked || now() - looked > LOOK * SECOND) {
                tell_state();
                looked = now();
            }
        }
}

static long peak(void) {
    FILE *file = fopen("/proc/self/status", "r");
    char line[256];
    long found = -1;
    while (file && fgets(line, sizeof line, file) && sscanf(line, "VmHWM: %ld", &found) != 1)
        ;
    if (file)
        fclose(file);
    return found;
}

static void measure_memory(void) {
    read_inputs(&models[0]); /* all, as it takes none yet: they are not the model's, nor is the runtime */
    long before = peak();
    load_model(&models[0]);
    for (int i = 0; i < MEMORY_CALLS; i++)
        call(&models[0]);
    long after = peak();
    if (before < 0 || after < 0)
        printf("{\"peak_bytes\": null}");
    else
        printf("{\"peak_bytes\": %lld}", (long long)(after - before) * 1024);
    end_line();
}

static const char *tell_real(double value, const char *next) {
    if (isnan(value) || isinf(value))
        printf(isnan(value) ? "NaN" : value < 0 ? "-Infinity" : "Infinity");
    else
        printf("%.17g", value);
    return next;
}

#define WHOLE(kind, form, as) \
    { \
        kind value; \
        memcpy(&value, data, sizeof value); \
        printf(form, (as)value); \
        return data + sizeof value; \
    }

static const char *tell_number(const char *data, int type) {
    float single;
    double twice;
    switch (type) {
    case FLOAT:
        memcpy(&single, data, sizeof single);
        return tell_real(single, data + sizeof single);
    case DOUBLE:
        memcpy(&twice, data, sizeof twice);
        return tell_real(twice, data + sizeof twice);
    case UINT8: WHOLE(uint8_t, "%d", int)
    case INT8: WHOLE(int8_t, "%d", int)
    case UINT16: WHOLE(uint16_t, "%d", int)
    case INT16: WHOLE(int16_t, "%d", int)
    case INT32: WHOLE(int32_t, "%d", int)
    case INT64: WHOLE(int64_t, "%lld", long long)
    case UINT32: WHOLE(uint32_t, "%u", unsigned)
    case UINT64: WHOLE(uint64_t, "%llu", unsigned long long)
    default: /* BOOL */
        printf(*data ? "true" : "false");
        return data + 1;
    }
}

static const char *tell_nested(const char *data, int type, const int64_t *dimensions, size_t rank) {
    if (!rank)
        return tell_number(data, type);
    putchar('[');
    for (int64_t i = 0; i < dimensions[0]; i++) {
        if (i)
            printf(", ");
        data = tell_nested(data, type, dimensions + 1, rank - 1);
    }
    putchar(']');
    return data;
}

static void tell_outputs(void) {
    load_models();
    for (size_t i = 0; i < count; i++) {
        void *shape, *data;
        int type;
        size_t rank;
        int64_t dimensions[MOST_RANK];
        run(&models[i]);
        check(ORT(GetTensorTypeAndShape, void *, void **)(models[i].output, &shape));
        check(ORT(GetTensorElementType, void *, int *)(shape, &type));
        check(ORT(GetDimensionsCount, void *, size_t *)(shape, &rank));
        if (rank > MOST_RANK || type < FLOAT || type > UINT64 || (type > INT64 && type < DOUBLE && type != BOOL))
            fail("its first output is of a kind that cannot be shown: ", models[i].output_name);
        check(ORT(GetDimensions, void *, int64_t *, size_t)(shape, dimensions, rank));
        RELEASE(ReleaseTensorTypeAndShapeInfo, shape);
        check(ORT(GetTensorMutableData, void *, void **)(models[i].output, &data));
        printf("{\"model\": %s, \"output\": ", models[i].name);
        tell_nested(data, type, dimensions, rank);
        printf("}");
        end_line();
        forget(&models[i]);
    }
}

static void stop(int signal) {
    (void)signal;
    stopped = 1;
}

int main(int number, char **words) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = stop;
    sigaction(SIGHUP, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    signal(SIGPIPE, SIG_IGN); /* then writing fails, and what was changed is taken back */
    const char *version = load_runtime(), *what = number > 1 ? words[1] : "";
    if (!strcmp(what, "version")) {
        printf("%s", version);
        end_line();
        leave(0);
    }
    read_spec();
    if (replaces)
        end_other(replaces);
    if (cores)
        pin(cores);
    if (lock)
        be_alone();
    if (!strcmp(what, "time"))
        measure_time(version);
    else if (!strcmp(what, "memory"))
        measure_memory();
    else if (!strcmp(what, "outputs"))
        tell_outputs();
    else
        fail("it is to do what it does not know: ", what);
    leave(0);
    return 0;
}
