// SPDX-License-Identifier: GPL-2.0
/* See arena.h. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "arena.h"

/* By the number of an end. */
enum kind { LISTENER, TCP, UDP, UNIX_STREAM, UNIX_DATAGRAM, PIPE_IN, PIPE_OUT, EVENT, TIMER,
	    REGULAR };

static enum kind kind_of(int end)
{
	static const enum kind kinds[ENDS] = {
		LISTENER, LISTENER, LISTENER, LISTENER, TCP, TCP, TCP, TCP, TCP, TCP, TCP, TCP,
		UDP, UDP, UNIX_STREAM, UNIX_STREAM, UNIX_DATAGRAM, PIPE_IN, PIPE_OUT, EVENT,
		TIMER, REGULAR, REGULAR, TCP,
	};

	return kinds[end];
}

static uint64_t random_address(struct arena *a, uint64_t *seed)
{
	switch (random_next(seed) % 8) {
	case 0:
		return 0;
	case 1:
		return random_next(seed);
	case 2:
		return (uintptr_t)KERNEL_ADDRESS + random_next(seed) % 4096;
	case 3:
		return (uintptr_t)a->r.shared + random_next(seed) % a->r.args.bytes;
	default:
		return (uintptr_t)a->memory + random_next(seed) % ARENA_MEMORY;
	}
}

static struct mp_request random_request(struct arena *a, uint64_t *seed)
{
	struct mp_request q = {
		.op = random_next(seed) % MP_NR_OPS,
		.handle = random_next(seed) % (ENDS + 8),
	};

	/* Resets and unregistrations must not win, or nothing else happens. */
	if ((q.op == MP_OP_DISCONNECT || q.op == MP_OP_UNREGISTER) && random_next(seed) % 8)
		q.op = random_next(seed) % 2 ? MP_OP_REGISTER : MP_OP_ACCEPT;
	switch (q.op) {
	case MP_OP_REGISTER:
		q.fd = a->ends[random_next(seed) % ENDS];
		q.cookie = random_next(seed);
		if (random_next(seed) % 4 == 0)
			q.fd = MP_LWSOCKET_BASE + random_next(seed) % 8;
		if (random_next(seed) % 32 == 0) {
			q.len = 1 + random_next(seed) % 3;
			q.addr = (uintptr_t)a->memory + random_next(seed) % (ARENA_MEMORY - 4);
		}
		break;
	case MP_OP_ACCEPT:
		q.len = random_next(seed) % 3;
		q.flags = random_next(seed) % 2 ? MP_ACCEPT_LWSOCKET : 0;
		break;
	case MP_OP_READ ... MP_OP_WRITEV:
		q.addr = random_address(a, seed);
		/* Mostly little: what is copied takes time in which nothing else is tried. */
		q.len = random_next(seed) % 32 ? random_next(seed) % 300 : random_next(seed);
		if (random_next(seed) % 4 == 0) {
			q.flags = MP_AT_OFFSET;
			q.cookie = random_next(seed) % 100000;
		}
		break;
	case MP_OP_DROP:
		q.handle = 0;
		q.fd = MP_LWSOCKET_BASE + random_next(seed) % 8;
		break;
	}
	switch (random_next(seed) % 64) {
	case 0:
		q.flags = random_next(seed);
		break;
	case 1:
		q.reserved = random_next(seed);
		break;
	case 2:
		q.fd = random_next(seed);
		break;
	case 3:
		q.handle = random_next(seed);
		break;
	case 4:
		q.op = random_next(seed);
		break;
	case 5:
		q.cookie = random_next(seed);
		break;
	case 6:
		q.len = random_next(seed);
		break;
	case 7:
		q.addr = random_address(a, seed);
		break;
	}
	return q;
}

void arena_requests(struct arena *a, uint64_t *seed)
{
	for (int slot = 0; slot < 16; slot++)
		a->r.sq[slot] = random_request(a, seed);
}

static void arena_fill(struct arena *a, int end)
{
	char path[64];
	int ends[2];
	struct pair p = { .mine = -1, .peer = -1 };

	switch (kind_of(end)) {
	case LISTENER:
		p.mine = listening();
		MUST(fcntl(p.mine, F_SETFL, O_NONBLOCK));
		p.peer = connected(p.mine);
		break;
	case TCP:
		p = tcp_pair(end % 2 ? 4096 : 0);
		break;
	case UDP:
		p.mine = bound(MUST(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0)));
		p.peer = MUST(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
		{
			struct sockaddr_in address;
			socklen_t size = sizeof(address);

			MUST(getsockname(p.mine, (struct sockaddr *)&address, &size));
			MUST(connect(p.peer, (struct sockaddr *)&address, size));
		}
		break;
	case UNIX_STREAM:
	case UNIX_DATAGRAM:
		MUST(socketpair(AF_UNIX, (kind_of(end) == UNIX_STREAM ? SOCK_STREAM : SOCK_DGRAM) |
				SOCK_CLOEXEC, 0, ends));
		p.mine = ends[0];
		p.peer = ends[1];
		break;
	case PIPE_IN:
	case PIPE_OUT:
		MUST(pipe2(ends, O_CLOEXEC | O_NONBLOCK));
		p.mine = ends[kind_of(end) == PIPE_OUT];
		p.peer = ends[kind_of(end) == PIPE_IN];
		break;
	case EVENT:
		p.mine = MUST(eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK));
		break;
	case TIMER:
		p.mine = MUST(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC));
		{
			struct itimerspec often = { .it_interval.tv_nsec = 3000000,
						    .it_value.tv_nsec = 3000000 };

			MUST(timerfd_settime(p.mine, 0, &often, NULL));
		}
		break;
	case REGULAR:
		snprintf(path, sizeof(path), "/tmp/mp-test-arena-%d-%d", getpid(), end);
		p.mine = MUST(open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
		MUST(unlink(path));
		MUST(ftruncate(p.mine, 50000));
		break;
	}
	a->ends[end] = p.mine;
	a->peers[end] = p.peer;
}

void arena_make(struct arena *a, unsigned int flags)
{
	char *memory;

	*a = (struct arena){ .r = raw_channel_with(16, 16, flags) };
	/*
	 * A gap ends what is read into the memory, and another one what is read
	 * into the rings. Far from everything else: a request one byte of whose
	 * address was scribbled over must not read into somebody's stack.
	 */
	memory = mmap((void *)ARENA_ADDRESS, 2 * ARENA_MEMORY, PROT_NONE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	TRUE(memory != MAP_FAILED);
	a->memory = memory;
	MUST(mprotect(memory, ARENA_MEMORY, PROT_READ | PROT_WRITE));
	memory = mremap(a->r.shared, a->r.args.bytes, a->r.args.bytes,
			MREMAP_MAYMOVE | MREMAP_FIXED, memory + ARENA_MEMORY + 4096);
	TRUE(memory != MAP_FAILED);
	a->r.shared = (void *)memory;
	a->r.sq = (void *)(memory + a->r.args.sq_offset);
	a->r.cq = (void *)(memory + a->r.args.cq_offset);
	for (int i = 0; i < ENDS; i++)
		arena_fill(a, i);
}

static void arena_close(const struct arena *a, int end)
{
	close(a->ends[end]);
	if (a->peers[end] >= 0)
		close(a->peers[end]);
}

void arena_end(struct arena *a)
{
	raw_close(&a->r);
	for (int i = 0; i < ENDS; i++)
		arena_close(a, i);
	munmap(a->memory, 2 * ARENA_MEMORY);
}

void arena_stir(struct arena *a, uint64_t *seed)
{
	int end = random_next(seed) % ENDS, peer = a->peers[end];
	struct sockaddr_in address;
	socklen_t bytes = sizeof(address);
	char buffer[512] = { 0 };
	size_t size = random_next(seed) % sizeof(buffer);

	switch (random_next(seed) % 16) {
	case 0:
		if (kind_of(end) != LISTENER && peer >= 0)
			shutdown(peer, SHUT_WR);
		break;
	case 1:
		arena_close(a, end);
		arena_fill(a, end);
		close_range(FIRST_ACCEPTED, ~0U, 0);
		break;
	case 2:
		if (kind_of(end) == LISTENER) {
			close(peer);
			/* A request may have shut the listener down. */
			a->peers[end] = tcp_socket();
			fcntl(a->peers[end], F_SETFL, O_NONBLOCK);
			MUST(getsockname(a->ends[end], (struct sockaddr *)&address, &bytes));
			connect(a->peers[end], (struct sockaddr *)&address, bytes);
		}
		break;
	case 3 ... 8:
		if (kind_of(end) == PIPE_OUT)
			size = read(peer, buffer, size);
		else
			recv(peer, buffer, size, MSG_DONTWAIT);
		break;
	default:
		if (kind_of(end) == PIPE_IN || kind_of(end) == EVENT)
			size = write(peer < 0 ? a->ends[end] : peer, buffer, size);
		else
			send(peer, buffer, size, MSG_DONTWAIT | MSG_NOSIGNAL);
	}
}

void arena_cross(struct arena *a, uint64_t *seed)
{
	struct mp_shared *shared = a->r.shared;
	uint32_t cq_head = __atomic_load_n(&shared->cq_tail, __ATOMIC_ACQUIRE);
	int ret;

	/* Rings are 16 long: what cannot be right is not worth a try. */
	if (cq_head - a->cq_head > 16)
		cq_head = a->cq_head + random_next(seed) % 17;
	__atomic_store_n(&shared->cq_head, cq_head, __ATOMIC_RELEASE);
	__atomic_store_n(&shared->sq_tail, a->sq_head + random_next(seed) % 17, __ATOMIC_RELEASE);
	ret = enter(a->r.fd, MP_ENTER_SUBMIT);
	if (ret == -EBADMSG) {
		/* This one is always right. */
		a->refused++;
		__atomic_store_n(&shared->cq_head, a->cq_head, __ATOMIC_RELEASE);
		__atomic_store_n(&shared->sq_tail, a->sq_head, __ATOMIC_RELEASE);
	} else if (ret < 0 || ret > 16) {
		fail("expected a crossing to take 0 to 16 requests, came %s", show(ret));
	} else {
		a->cq_head = cq_head;
		a->sq_head += ret;
		a->done += ret;
	}
	shared->timeout_ns = random_next(seed) % 4 ? 0 : random_next(seed) % 100000;
	ret = enter(a->r.fd, MP_ENTER_WAIT);
	if (ret == -EBADMSG)
		a->refused++;
	else if (ret != 0 && ret != -EINTR)
		fail("expected a crossing to return 0, -EINTR or -EBADMSG, came %s", show(ret));
}

void reserve_descriptors(void)
{
	struct rlimit limit = { 2048, 2048 };
	int fd;

	MUST(setrlimit(RLIMIT_NOFILE, &limit));
	do {
		fd = MUST(open("/dev/null", O_RDONLY | O_CLOEXEC));
	} while (fd < FIRST_ACCEPTED - 4 * ENDS);
}

void *arena_scribble(void *argument)
{
	struct arena *a = argument;
	uint64_t seed = __atomic_add_fetch(&a->seed, 0x9e3779b97f4a7c15, __ATOMIC_RELAXED);
	char *memory = (char *)a->r.shared;

	for (int turn = 0; !atomic_load(&a->over); turn++) {
		for (int i = 0; i < 256; i++) {
			/* Rarely the indices, or no crossing would get beyond them. */
			uint64_t what = random_next(&seed) % (turn % 64 ? 28 : 32);
			struct mp_request *q = &a->r.sq[random_next(&seed) % 16];

			if (what < 24)
				*q = random_request(a, &seed);
			else if (what < 28)
				((volatile char *)q)[random_next(&seed) % 32] = random_next(&seed);
			else if (what < 30)
				((volatile char *)memory)[random_next(&seed) % a->r.args.bytes] =
					random_next(&seed);
			else
				((volatile uint32_t *)memory)[random_next(&seed) % 32] =
					random_next(&seed) % 64;
		}
		/* One processor may have to do for all: the crossings are the point. */
		usleep(100);
	}
	return NULL;
}
