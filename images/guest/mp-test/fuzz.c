// SPDX-License-Identifier: GPL-2.0
/*
 * mp-test --fuzz: calls and ring contents at random, for as long as one likes.
 *
 * Each round is a process of its own, whose random numbers all come from one
 * seed. When a round goes wrong, its seed is printed, and runs it again.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "arena.h"

enum { CROSSINGS = 1500, ROUND_SECONDS = 600 };

/* What all rounds have done so far; shared by every process. */
struct progress {
	_Atomic uint64_t calls;
	_Atomic uint64_t requests;
	_Atomic uint64_t refused;
};

static void *enter_from_afar(void *argument)
{
	struct arena *a = argument;

	EXPECT(enter(a->r.fd, MP_ENTER_SUBMIT | MP_ENTER_WAIT), -EPERM);
	return NULL;
}

static void make_another(struct arena *a, uint64_t *seed)
{
	struct mp_create args = {
		.sq_entries = random_next(seed) % 4 ? 1U << random_next(seed) % 12
							 : random_next(seed),
		.cq_entries = random_next(seed) % 4 ? 1U << random_next(seed) % 12
							 : random_next(seed),
		.flags = random_next(seed) % 4 ? random_next(seed) % 8 : random_next(seed),
		.reserved = random_next(seed) % 8 ? 0 : random_next(seed),
	};
	int from = device();
	void *where = random_next(seed) % 4 ? &args : (void *)(a->memory + ARENA_MEMORY - 8);
	int fd = ioctl(from, MP_IOC_CREATE, where);

	if (fd >= 0) {
		enter(fd, random_next(seed) % 4);
		close(fd);
	}
	ioctl(from, random_next(seed), random_next(seed));
	close(from);
}

static void map_again(struct arena *a, uint64_t *seed)
{
	static const int kinds[] = { MAP_SHARED, MAP_PRIVATE, MAP_SHARED | MAP_POPULATE,
				     MAP_SHARED | MAP_LOCKED };
	size_t bytes = random_next(seed) % 4 ? a->r.args.bytes : random_next(seed) % 65536;
	off_t offset = random_next(seed) % 4 ? 0 : random_next(seed) % 4 * 4096;
	void *memory = mmap(NULL, bytes, random_next(seed) % 8, kinds[random_next(seed) % 4],
			    a->r.fd, offset);

	if (memory != MAP_FAILED)
		munmap(memory, bytes);
}

/* Everything else that can be done to a channel's descriptor and its memory. */
static void surface(struct arena *a, bool scribbled, uint64_t *seed)
{
	struct pollfd poll_it = { .fd = a->r.fd, .events = random_next(seed) };
	char byte = 0;
	int over[2], fd, advice;
	pid_t pid;

	switch (random_next(seed) % 16) {
	case 0:
		ioctl(a->r.fd, random_next(seed), random_next(seed));
		break;
	case 1:
		EXPECT(enter(a->r.fd, random_next(seed) | 4), -EINVAL);
		break;
	case 2:
		make_another(a, seed);
		break;
	case 3:
		map_again(a, seed);
		break;
	case 4:
		advice = random_next(seed) % 26;
		/* Rarely what throws the pages away: the next access is then a SIGBUS. */
		if ((advice != MADV_DONTNEED && advice != MADV_FREE && advice != MADV_REMOVE &&
		     advice != MADV_DONTNEED_LOCKED) || random_next(seed) % 64 == 0)
			madvise(a->r.shared, a->r.args.bytes, advice);
		break;
	case 5:
		if (scribbled)		/* those who do would fault */
			break;
		/* The rings read-only, for a while; the kernel has its own way to them. */
		MUST(mprotect(a->r.shared, a->r.args.bytes, PROT_READ));
		enter(a->r.fd, MP_ENTER_SUBMIT);
		MUST(mprotect(a->r.shared, a->r.args.bytes, PROT_READ | PROT_WRITE));
		break;
	case 6:
		fd = MUST(dup(a->r.fd));
		enter(fd, MP_ENTER_SUBMIT);
		close(fd);
		break;
	case 7:
		EXPECT(read(a->r.fd, &byte, 1), -1);
		EXPECT(write(a->r.fd, &byte, 1), -1);
		lseek(a->r.fd, 1, SEEK_SET);
		poll(&poll_it, 1, 0);
		fsync(a->r.fd);
		EXPECT(ftruncate(a->r.fd, 100), -1);
		fcntl(a->r.fd, F_SETFL, O_NONBLOCK | O_ASYNC);
		break;
	case 8:
		MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, over));
		EXPECT(send_descriptor(over[0], a->r.fd), -EINVAL);
		close(over[0]);
		close(over[1]);
		break;
	case 9:
		join(start(enter_from_afar, a));
		break;
	case 10:
		pid = MUST(fork());
		if (!pid) {
			/* It has neither descriptor nor memory. */
			_exit(enter(a->r.fd, MP_ENTER_SUBMIT) != -EBADF);
		}
		EXPECT(status_of(pid), 0);
		break;
	case 11:
		/* The memory that requests name comes and goes. */
		MUST(madvise(a->memory, ARENA_MEMORY, MADV_DONTNEED));
		MUST(mprotect(a->memory + 4096, 4096, random_next(seed) % 4));
		break;
	case 12:
		MUST(mprotect(a->memory, ARENA_MEMORY, PROT_READ | PROT_WRITE));
		break;
	default:
		arena_stir(a, seed);
	}
}

static void round_of(uint64_t seed, struct progress *progress)
{
	struct arena *a = malloc(sizeof(*a));
	uint64_t choice = random_next(&seed);
	bool scribbled = choice & 8;
	pthread_t threads[2];

	batch = choice & 1;
	reserve_descriptors();
	arena_make(a, (choice & 2 ? MP_PARTITION : 0) | (choice & 4 ? MP_LWSOCKET : 0));
	a->seed = random_next(&seed);
	set_timer(50, true);		/* a time-out that was scribbled over may be long */
	for (int i = 0; scribbled && i < 2; i++)
		threads[i] = start(arena_scribble, a);
	for (int i = 0; i < CROSSINGS; i++) {
		unsigned long done = a->done, refused = a->refused;

		if (!scribbled)
			arena_requests(a, &seed);
		arena_cross(a, &seed);
		if (i % 8 == 0)
			surface(a, scribbled, &seed);
		atomic_fetch_add(&progress->requests, a->done - done);
		atomic_fetch_add(&progress->refused, a->refused - refused);
		atomic_fetch_add(&progress->calls, a->done - done + 2 + (i % 8 == 0));
	}
	switch (choice >> 4 & 3) {
	case 0:
		kill(getpid(), SIGKILL);
		break;
	case 1:
		_exit(0);
	}
	atomic_store(&a->over, true);
	for (int i = 0; scribbled && i < 2; i++)
		join(threads[i]);
	arena_end(a);
	free(a);
}

/* Returns whether the round went well; says what was wrong. */
static bool run_round(uint64_t seed, struct progress *progress)
{
	const char *complaint;
	char text[600];
	int ends[2], status = 0;
	ssize_t length;
	bool ended;
	pid_t pid;

	MUST(pipe2(ends, O_CLOEXEC | O_NONBLOCK));
	fflush(stdout);
	pid = MUST(fork());
	if (!pid) {
		setpgid(0, 0);
		report_fd = ends[1];
		signal(SIGPIPE, SIG_DFL);
		round_of(seed, progress);
		_exit(0);
	}
	setpgid(pid, pid);
	ended = reap(pid, ROUND_SECONDS, &status);
	kill(-pid, SIGKILL);
	if (!ended)
		ended = reap(pid, 20, &status) && false;
	close(ends[1]);
	length = read(ends[0], text, sizeof(text) - 1);
	close(ends[0]);
	text[length > 0 ? length : 0] = '\0';
	complaint = kernel_complaint();
	if (!ended)
		printf("FAIL fuzz, seed %#llx: a round does not end\n", (unsigned long long)seed);
	else if (*text)
		printf("FAIL fuzz, seed %#llx: %s\n", (unsigned long long)seed, text);
	else if (complaint)
		printf("FAIL fuzz, seed %#llx: the kernel says: %s\n", (unsigned long long)seed,
		       complaint);
	else if (status && !(WIFSIGNALED(status) &&
			     (WTERMSIG(status) == SIGKILL || WTERMSIG(status) == SIGBUS)))
		printf("FAIL fuzz, seed %#llx: wait status %#x\n", (unsigned long long)seed, status);
	else
		return true;
	printf("run it again with: mp-test --fuzz 1 --seed %#llx\n", (unsigned long long)seed);
	return false;
}

int fuzz(uint64_t calls, uint64_t seed)
{
	struct progress *progress = mmap(NULL, sizeof(*progress), PROT_READ | PROT_WRITE,
					 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	uint64_t said = now_ns(), round = seed, rounds = 0;

	TRUE(progress != MAP_FAILED);
	printf("fuzz: %llu calls, seed %#llx\n", (unsigned long long)calls,
	       (unsigned long long)seed);
	do {
		if (!run_round(round, progress))
			return 1;
		rounds++;
		random_next(&round);
		if (now_ns() - said > 10000000000ULL) {
			said = now_ns();
			printf("fuzz: %llu calls\n", (unsigned long long)progress->calls);
		}
	} while (progress->calls < calls);
	printf("ok fuzz: %llu calls in %llu rounds: %llu requests executed, %llu crossings refused\n",
	       (unsigned long long)progress->calls, (unsigned long long)rounds,
	       (unsigned long long)progress->requests, (unsigned long long)progress->refused);
	return 0;
}
