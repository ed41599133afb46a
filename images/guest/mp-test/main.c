// SPDX-License-Identifier: GPL-2.0
/*
 * Conformance and bad input: every call of libmegapipe, and everything that a
 * program can do wrong to a channel, through the library and below it.
 *
 * Each case runs in a child of its own, under a time limit, and ends in one
 * line: "ok NAME", or "FAIL NAME: what was expected, what came". What the kernel
 * itself complains about while a case runs (a warning, a report of a sanitizer)
 * is a failure of that case.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "test.h"

/* In this order: the last group looks at what all others have left. */
static const struct test_case *const groups[] = {
	calls_cases,
	rings_cases,
	wrong_cases,
	processes_cases,
	attacks_cases,
	ends_cases,
	listeners_cases,
	partitions_cases,
	lwsockets_cases,
	files_cases,
	leftovers_cases,
};

enum { GROUPS = sizeof(groups) / sizeof(*groups), MOST_CASES = 256 };

static const struct test_case *cases[MOST_CASES];
static int nr_cases;

static void collect_cases(void)
{
	for (int group = 0; group < GROUPS; group++)
		for (const struct test_case *c = groups[group]; c->name; c++)
			cases[nr_cases++] = c;
}

static int time_limit = 30;	/* seconds, for one case */
static int kernel_log = -1;

/* The first complaint of the kernel since the last call, or NULL. */
const char *kernel_complaint(void)
{
	static const char *const signs[] = {
		"WARNING:", "BUG:", "Oops", "KASAN", "UBSAN", "general protection", "INFO: ",
		"soft lockup", "refcount_t", "use-after-free", "list_add corruption",
		"list_del corruption", "scheduling while atomic",
	};
	static char found[300];
	char record[2048];
	bool any = false;

	for (;;) {
		ssize_t length = read(kernel_log, record, sizeof(record) - 1);
		char *text;

		if (length < 0 && errno == EPIPE)
			continue;	/* records have been overwritten: go on behind */
		if (length <= 0)
			break;
		record[length] = '\0';
		text = strchr(record, ';');
		for (size_t i = 0; text && !any && i < sizeof(signs) / sizeof(*signs); i++) {
			if (!strstr(text, signs[i]))
				continue;
			any = true;
			snprintf(found, sizeof(found), "%.*s", (int)strcspn(text + 1, "\n"),
				 text + 1);
		}
	}
	return any ? found : NULL;
}

static void __attribute__((noreturn)) run_child(int index, int pipe_end)
{
	setpgid(0, 0);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGPIPE, SIG_DFL);	/* a write must not raise it */
	report_fd = pipe_end;
	cases[index]->run();
	_exit(0);
}

/* Wait for a child no longer than the time limit. Returns false if it has passed. */
bool reap(pid_t pid, int seconds, int *status)
{
	struct timespec left = { .tv_nsec = 100000000 };
	uint64_t end = now_ns() + seconds * 1000000000ULL;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	for (;;) {
		if (waitpid(pid, status, WNOHANG) == pid)
			return true;
		if (now_ns() >= end)
			return false;
		sigtimedwait(&set, NULL, &left);
	}
}

static bool run_case(int index)
{
	char name[64], text[600];
	const char *complaint;
	ssize_t length;
	int ends[2], status = 0;
	bool ended;
	pid_t pid;

	snprintf(name, sizeof(name), "%s/%s", cases[index]->name, batch ? "batch" : "plain");
	pid = pipe2(ends, O_CLOEXEC | O_NONBLOCK) ? -1 : fork();
	if (pid < 0) {
		printf("FAIL %s: cannot start: %s\n", name, strerror(errno));
		return false;
	}
	if (!pid)
		run_child(index, ends[1]);
	setpgid(pid, pid);
	ended = reap(pid, time_limit, &status);
	kill(-pid, SIGKILL);
	close(ends[1]);
	length = read(ends[0], text, sizeof(text) - 1);
	close(ends[0]);
	text[length > 0 ? length : 0] = '\0';
	complaint = kernel_complaint();

	if (!ended && !reap(pid, 10, &status))
		printf("FAIL %s: not over after %d s, and SIGKILL does not end it\n", name,
		       time_limit);
	else if (!ended)
		printf("FAIL %s: not over after %d s%s%s\n", name, time_limit,
		       *text ? "; " : "", text);
	else if (*text)
		printf("FAIL %s: %s\n", name, text);
	else if (status)
		printf("FAIL %s: expected to end well, its wait status is %#x\n", name, status);
	else if (complaint)
		printf("FAIL %s: the kernel says: %s\n", name, complaint);
	else
		printf("ok %s\n", name);
	return ended && !*text && !status && !complaint;
}

static bool chosen(int index, char **names, int count)
{
	for (int i = 0; i < count; i++)
		if (!strcmp(names[i], cases[index]->name))
			return true;
	return count == 0;
}

static void usage(void)
{
	puts("usage: mp-test [--plain | --batch] [--scale N] [--limit SECONDS] [case...]\n"
	     "       mp-test --list\n"
	     "       mp-test --fuzz CALLS [--seed N]\n"
	     "       mp-test --stress SECONDS [--seed N]\n"
	     "       mp-test --disk FILE\n"
	     "       mp-test --exhaust\n"
	     "Runs every case, or those named, in both modes, or in the one named. Long loops go\n"
	     "round N times as often; a case that takes longer than the limit (30 s) has failed.\n"
	     "--fuzz makes calls at random, --stress lets servers and clients race, until there were\n"
	     "so many calls or seconds; the seed that they print repeats them. --disk writes FILE, on\n"
	     "a slow disk, and reads it while it serves a connection. --exhaust takes all memory that\n"
	     "channels can be made to take.\n"
	     "Exit status: 0, all are right; 1, some are not; 2, wrong arguments or no module.");
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "plain", no_argument, NULL, 'p' },
		{ "batch", no_argument, NULL, 'b' },
		{ "scale", required_argument, NULL, 's' },
		{ "limit", required_argument, NULL, 'l' },
		{ "list", no_argument, NULL, 'L' },
		{ "fuzz", required_argument, NULL, 'f' },
		{ "stress", required_argument, NULL, 'S' },
		{ "seed", required_argument, NULL, 'r' },
		{ "disk", required_argument, NULL, 'd' },
		{ "exhaust", no_argument, NULL, 'e' },
		{ "help", no_argument, NULL, 'h' },
		{ NULL, 0, NULL, 0 },
	};
	bool plain = true, batched = true, right = true;
	uint64_t calls = 0, seed = now_ns() | 1;
	int seconds = 0;
	sigset_t set;
	int option;

	collect_cases();
	if (argc == 5 && !strcmp(argv[1], "--exec-child"))
		return exec_child(argv + 2);
	while ((option = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		switch (option) {
		case 'p':
			batched = false;
			break;
		case 'b':
			plain = false;
			break;
		case 's':
			scale = atoi(optarg);
			break;
		case 'l':
			time_limit = atoi(optarg);
			break;
		case 'L':
			for (int i = 0; i < nr_cases; i++)
				puts(cases[i]->name);
			return 0;
		case 'e':
			return exhaust();
		case 'd':
			return disk(optarg);
		case 'f':
			calls = strtoull(optarg, NULL, 0);
			break;
		case 'S':
			seconds = atoi(optarg);
			break;
		case 'r':
			/* The generator needs one that is not 0. */
			seed = strtoull(optarg, NULL, 0) ?: 1;
			break;
		case 'h':
			usage();
			return 0;
		default:
			usage();
			return 2;
		}
	}
	for (int i = optind; i < argc; i++) {
		int known = 0;

		for (int j = 0; j < nr_cases; j++)
			known += !strcmp(argv[i], cases[j]->name);
		if (!known) {
			fprintf(stderr, "mp-test: there is no case \"%s\": see --list\n", argv[i]);
			return 2;
		}
	}
	if (scale < 1 || time_limit < 1) {
		fputs("mp-test: --scale and --limit need a number from 1\n", stderr);
		return 2;
	}
	if (access("/dev/megapipe", R_OK | W_OK)) {
		fprintf(stderr, "mp-test: /dev/megapipe: %s: is the module loaded?\n",
			strerror(errno));
		return 2;
	}

	setvbuf(stdout, NULL, _IOLBF, 0);
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigprocmask(SIG_BLOCK, &set, NULL);
	note_start();
	/* Without the right to read it, the kernel's complaints go unnoticed. */
	kernel_log = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (kernel_log >= 0)
		lseek(kernel_log, 0, SEEK_END);

	if (calls)
		return fuzz(calls, seed);
	if (seconds)
		return stress(seconds, seed);
	for (int mode = 0; mode < 2; mode++) {
		batch = mode;
		if (!(batch ? batched : plain))
			continue;
		for (int i = 0; i < nr_cases; i++)
			if (chosen(i, argv + optind, argc - optind))
				right &= run_case(i);
	}
	return !right;
}
