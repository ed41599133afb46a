/*
 * What the groups of cases of mp-test share. See main.c for what a case is.
 */
#ifndef MP_TEST_H
#define MP_TEST_H

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>

#include "megapipe.h"

struct test_case {
	const char *name;
	void (*run)(void);
};

/* Each ends with a case that has no name. */
extern const struct test_case calls_cases[];
extern const struct test_case rings_cases[];
extern const struct test_case wrong_cases[];
extern const struct test_case processes_cases[];
extern const struct test_case attacks_cases[];
extern const struct test_case ends_cases[];
extern const struct test_case listeners_cases[];
extern const struct test_case partitions_cases[];
extern const struct test_case lwsockets_cases[];
extern const struct test_case files_cases[];
extern const struct test_case leftovers_cases[];

enum {
	SOON = 10000,	/* ms: longer than an event that must come can take */
	NEVER = 30,	/* ms: how long to look for an event that must not come */
	/* Descriptors from here on belong to nobody but the kernel's accepts. */
	FIRST_ACCEPTED = 700,
};

/* An address of the kernel's half. */
#define KERNEL_ADDRESS	((void *)0xffff888000000000UL)
/* Below mmap_min_addr: nothing is there. */
#define NO_ADDRESS	((void *)16)

extern bool batch;		/* the mode of this run of a case */
extern int scale;		/* how often the long loops go round */
extern int report_fd;

/* --- failing -------------------------------------------------------------------- */

void __attribute__((noreturn, format(printf, 1, 2))) fail(const char *format, ...);
const char *show(long long value);

/* The expression itself says what it is about. */
#define EXPECT(expression, want) do {							\
	long long got_ = (expression), want_ = (want);					\
	if (got_ != want_)								\
		fail("%s:%d: %s: expected %s, came %s", __FILE_NAME__, __LINE__, #expression,	\
		     show(want_), show(got_));						\
} while (0)

#define TRUE(condition) do {								\
	if (!(condition))								\
		fail("%s:%d: expected %s", __FILE_NAME__, __LINE__, #condition);			\
} while (0)

/* Where in the cases it is, for helpers that fail in their name. */
struct place {
	const char *file;
	int line;
};

#define HERE	((struct place){ __FILE_NAME__, __LINE__ })

/* A step without which the case makes no sense. */
#define MUST(call) ({									\
	long long must_ = (long long)(call);						\
	if (must_ == -1)								\
		fail("%s:%d: %s: %s", __FILE_NAME__, __LINE__, #call, strerror(errno));		\
	must_;										\
})

/* What a failed system call returned: -errno. */
int minus_errno(long ret);
uint64_t now_ns(void);
void sleep_ms(int ms);
/* xorshift: the same numbers in each run. */
uint64_t random_next(uint64_t *state);

/* Write to a file of /proc or /sys. Returns whether that was allowed. */
bool write_text(const char *path, const char *text);

/* --- sockets --------------------------------------------------------------------- */

struct pair {
	int mine;	/* goes into the channel */
	int peer;	/* an ordinary blocking socket */
	int handle;
};

int port_of(int fd);
int tcp_socket(void);
int bound(int fd);
int listening(void);
int connected_from(int fd, int listener);
int connected(int listener);
void close_politely(int fd);
unsigned int backlog(int listener);
void wait_backlog(int listener, unsigned int count);
struct pair make_pair(int listener, int buffers);
struct pair tcp_pair(int buffers);
void end_pair(struct pair *p);
void peer_sends(const struct pair *p, const char *text);
void peer_gets(const struct pair *p, const char *text);
void peer_sees_end(int fd);
void peer_sees_life(int fd);
char pattern(size_t at);
char *make_pattern(size_t size);

struct slow_reader {
	int fd;
	size_t size;
};

/* A thread that reads a stream of pattern() and is in no hurry. */
void *read_slowly(void *argument);

/* Two pages, of which the second cannot be used. */
char *half_page(int protection);

/* --- channels through the library ------------------------------------------------- */

struct mp_channel *make_channel(const struct mp_options *options);
struct mp_channel *channel_of(unsigned int requests, unsigned int completions);
/* With MP_PARTITION, MP_LWSOCKET; batching or not as the mode is. */
struct mp_channel *channel_with(unsigned int flags);
struct mp_channel *channel(void);
struct mp_event next(struct mp_channel *ch);
/* An event that may come or not. Returns whether it did. */
bool may_come(struct mp_channel *ch, struct mp_event *event, int timeout_ms);
const char *op_name(unsigned int op);
struct mp_event want_at(struct place at, struct mp_channel *ch, int handle, unsigned int op,
			int result);
void nothing_at(struct place at, struct mp_channel *ch);
void sleeps_at(struct place at, struct mp_channel *ch);
int add(struct mp_channel *ch, int fd);
struct pair added_pair(struct mp_channel *ch, int buffers);
void still_works(struct mp_channel *ch);

#define WANT(ch, handle, op, result)	want_at(HERE, ch, handle, op, result)
#define NOTHING(ch)	nothing_at(HERE, ch)
#define SLEEPS(ch)	sleeps_at(HERE, ch)

/* --- channels below the library ---------------------------------------------------- */

struct raw {
	int fd;
	struct mp_create args;
	struct mp_shared *shared;
	struct mp_request *sq;
	struct mp_completion *cq;
	uint32_t sq_tail;
	uint32_t cq_head;
};

#define SIZES(requests, completions) .sq_entries = (requests), .cq_entries = (completions)

int device(void);
int raw_create(struct mp_create *args);
struct raw raw_channel(uint32_t sq_entries, uint32_t cq_entries);
struct raw raw_channel_with(uint32_t sq_entries, uint32_t cq_entries, unsigned int flags);
void raw_close(struct raw *r);
int enter(int fd, unsigned long flags);
int raw_wait(struct raw *r, unsigned long flags, int64_t timeout_ns);
void raw_put(struct raw *r, struct mp_request request);
unsigned int raw_waiting(const struct raw *r);
struct mp_completion raw_take(struct raw *r);
struct mp_completion raw_do(struct raw *r, struct mp_request request);
void raw_begin(struct raw *r, struct mp_request request);
void raw_register(struct raw *r, uint32_t handle, int fd);
struct mp_completion raw_next(struct raw *r);

/* --- threads and children ------------------------------------------------------------ */

pthread_t start(void *(*run)(void *), void *argument);
void join(pthread_t thread);
pid_t child(void);
int status_of(pid_t pid);
void child_ends_well(pid_t pid);
int open_descriptors(void);
/* Over a UNIX socket: 1, or -errno. */
int send_descriptor(int over, int fd);
void interrupt(int number);
void set_timer(int ms, bool again);

/* --- main.c ------------------------------------------------------------------ */

/* Remember what was there before the first case (leftovers.c). */
void note_start(void);
/* The first complaint of the kernel since the last call, or NULL. */
const char *kernel_complaint(void);
/* Wait for a child no longer than so many seconds. Returns false if it has not ended. */
bool reap(pid_t pid, int seconds, int *status);
/* What --fuzz and --stress do; an exit status. */
int fuzz(uint64_t calls, uint64_t seed);
int stress(int seconds, uint64_t seed);
/* What --exhaust does (ends.c). */
int exhaust(void);
/* What --disk does (files.c). */
int disk(const char *path);
/* The program that --exec-child starts again (processes.c). */
int exec_child(char **arguments);

#endif
