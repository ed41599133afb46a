// SPDX-License-Identifier: GPL-2.0
/* Attacks below the library. */
#define _GNU_SOURCE
#include <poll.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "arena.h"
#include "test.h"

static void test_ioctls(void)
{
	struct raw r = raw_channel(4, 4);
	struct mp_create args = { SIZES(4, 4) }, *constant;
	int fd = device(), before = open_descriptors();
	struct pollfd poll_fd = { .fd = r.fd, .events = POLLIN };
	char buffer[8];

	EXPECT(enter(fd, 0), -ENOTTY);
	EXPECT(minus_errno(ioctl(r.fd, MP_IOC_CREATE, &args)), -ENOTTY);
	EXPECT(minus_errno(ioctl(r.fd, 0, 0)), -ENOTTY);
	EXPECT(minus_errno(ioctl(r.fd, MP_IOC_ENTER + 1, 0)), -ENOTTY);
	EXPECT(minus_errno(ioctl(r.fd, MP_IOC_ENTER | 0xffff0000, 0)), -ENOTTY);
	EXPECT(minus_errno(ioctl(fd, _IOWR('p', 0xe0, int), &args)), -ENOTTY);
	EXPECT(minus_errno(ioctl(fd, 0xffffffff, &args)), -ENOTTY);
	for (int bit = 2; bit < 64; bit++)
		EXPECT(enter(r.fd, 1UL << bit), -EINVAL);
	EXPECT(enter(r.fd, -1), -EINVAL);
	EXPECT(enter(r.fd, 0), 0);
	EXPECT(enter(r.fd, MP_ENTER_SUBMIT), 0);

	EXPECT(minus_errno(ioctl(fd, MP_IOC_CREATE, NULL)), -EFAULT);
	EXPECT(minus_errno(ioctl(fd, MP_IOC_CREATE, KERNEL_ADDRESS)), -EFAULT);
	EXPECT(minus_errno(ioctl(fd, MP_IOC_CREATE, half_page(PROT_NONE) + 4090)), -EFAULT);
	constant = (void *)half_page(PROT_READ | PROT_WRITE);
	*constant = args;
	MUST(mprotect(constant, 4096, PROT_READ));
	EXPECT(minus_errno(ioctl(fd, MP_IOC_CREATE, constant)), -EFAULT);
	EXPECT(open_descriptors(), before);

	EXPECT(minus_errno(read(r.fd, buffer, 1)), -EINVAL);
	EXPECT(minus_errno(write(r.fd, buffer, 1)), -EINVAL);
	EXPECT(minus_errno(read(fd, buffer, 1)), -EINVAL);
	lseek(r.fd, 1000, SEEK_SET);
	EXPECT(minus_errno(ftruncate(r.fd, 0)), -EINVAL);
	poll(&poll_fd, 1, 0);
	raw_close(&r);
	close(fd);
}

static void test_create_raw(void)
{
	const struct mp_create bad[] = {
		{ SIZES(0, 4) }, { SIZES(4, 0) }, { SIZES(3, 4) }, { SIZES(4, 3) },
		{ SIZES(MP_MAX_ENTRIES * 2, 4) }, { SIZES(4, MP_MAX_ENTRIES * 2) },
		{ SIZES(1U << 31, 1U << 31) }, { SIZES(UINT32_MAX, 4) },
		{ SIZES(4, 4), .flags = 1U << 31 }, { SIZES(4, 4), .flags = UINT32_MAX },
		{ SIZES(4, 4), .reserved = 1 },
	};
	struct rlimit limit, none = { 0, 0 };
	struct mp_create args = { SIZES(4, 4) };
	int fd = device(), before = open_descriptors();

	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		args = bad[i];
		EXPECT(minus_errno(ioctl(fd, MP_IOC_CREATE, &args)), -EINVAL);
	}
	MUST(getrlimit(RLIMIT_NOFILE, &limit));
	none.rlim_max = limit.rlim_max;
	MUST(setrlimit(RLIMIT_NOFILE, &none));
	for (int i = 0; i < 20; i++) {
		args = (struct mp_create){ SIZES(4, 4) };
		EXPECT(minus_errno(ioctl(fd, MP_IOC_CREATE, &args)), -EMFILE);
	}
	MUST(setrlimit(RLIMIT_NOFILE, &limit));
	EXPECT(open_descriptors(), before);
	/* Fields that go out are not looked at on the way in. */
	args = (struct mp_create){
		SIZES(4, 4), .bytes = 1, .sq_offset = 2, .cq_offset = UINT64_MAX };
	close(MUST(ioctl(fd, MP_IOC_CREATE, &args)));
	TRUE(args.bytes % 4096 == 0 && args.cq_offset + 4 * 32 <= args.bytes);
	close(fd);
}

static void refuse_map(int line, const struct raw *r, size_t bytes, int flags, off_t offset,
		       int want)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, r->fd, offset);
	int came = memory == MAP_FAILED ? -errno : 0;

	if (came != want)
		fail("line %d: mmap of %zu bytes at %ld: expected %s, came %s", line, bytes,
		     (long)offset, show(want), show(came));
}

static void test_mmap(void)
{
	struct raw r = raw_channel(256, 256);
	size_t bytes = r.args.bytes;
	char *second, *moved;

	refuse_map(__LINE__, &r, bytes - 4096, MAP_SHARED, 0, -EINVAL);
	refuse_map(__LINE__, &r, bytes + 4096, MAP_SHARED, 0, -EINVAL);
	refuse_map(__LINE__, &r, 1UL << 40, MAP_SHARED, 0, -EINVAL);
	refuse_map(__LINE__, &r, bytes, MAP_SHARED, 4096, -EINVAL);
	refuse_map(__LINE__, &r, bytes, MAP_SHARED, bytes, -EINVAL);
	refuse_map(__LINE__, &r, bytes, MAP_SHARED, 1L << 50, -EINVAL);
	refuse_map(__LINE__, &r, bytes, MAP_PRIVATE, 0, -EINVAL);

	/* A second view shows the same memory. */
	second = mmap(NULL, bytes, PROT_READ, MAP_SHARED, r.fd, 0);
	TRUE(second != MAP_FAILED);
	r.shared->reserved[3] = 0x1234;
	EXPECT(((struct mp_shared *)second)->reserved[3], 0x1234);
	TRUE(mremap(second, bytes, 2 * bytes, MREMAP_MAYMOVE) == MAP_FAILED);
	TRUE(mremap(second, 0, bytes, MREMAP_MAYMOVE) == MAP_FAILED);
	moved = mremap(second, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED,
		       half_page(PROT_NONE) - 64 * 4096);
	if (moved != MAP_FAILED)
		EXPECT(((struct mp_shared *)moved)->reserved[3], 0x1234);
	else
		moved = second;
	madvise(moved, bytes, MADV_DONTNEED);
	madvise(moved, bytes, MADV_REMOVE);
	mprotect(moved, bytes, PROT_READ | PROT_WRITE);
	mlock(moved, bytes);
	EXPECT(munmap(moved + 4096, 4096), 0);
	EXPECT(raw_do(&r, (struct mp_request){ .op = MP_OP_READ }).result, -ENOENT);

	/* The kernel has its own way to the rings. */
	r.shared->sq_tail++;
	r.sq[r.sq_tail & 255].op = 200;
	r.shared->timeout_ns = 0;
	EXPECT(munmap(r.shared, bytes), 0);
	EXPECT(enter(r.fd, MP_ENTER_SUBMIT | MP_ENTER_WAIT), 1);
	EXPECT(enter(r.fd, MP_ENTER_SUBMIT | MP_ENTER_WAIT), 0);
	r.shared = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, r.fd, 0);
	TRUE((void *)r.shared != MAP_FAILED);
	EXPECT(r.shared->sq_head, 2);
	EXPECT(r.shared->cq_tail, 2);
	raw_close(&r);
}

static void test_indices(void)
{
	struct raw r = raw_channel(4, 4);
	const uint32_t bad[] = { 5, 6, 100, 1U << 31, UINT32_MAX, UINT32_MAX - 3 };
	struct mp_request wrong = { .op = 99, .handle = 5, .cookie = 77 };

	/* Nothing is in the rings: sq_tail may be 0 to 4 ahead, cq_head 0 to 4 behind. */
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		for (unsigned long flags = 0; flags < 4; flags++) {
			r.shared->timeout_ns = -1;
			r.shared->sq_tail = bad[i];
			EXPECT(enter(r.fd, flags), -EBADMSG);
			r.shared->sq_tail = 0;
			r.shared->cq_head = -bad[i];
			EXPECT(enter(r.fd, flags), -EBADMSG);
			r.shared->cq_head = 1;
			EXPECT(enter(r.fd, flags), -EBADMSG);
			r.shared->cq_head = 0;
		}
	}
	/* No harm done. */
	EXPECT(raw_do(&r, wrong).result, -EINVAL);
	/* The kernel does not believe its own copies. */
	for (int i = 0; i < 50; i++) {
		r.shared->sq_head = 0x55555555U * i;
		r.shared->cq_tail = 0x33333333U * i;
		r.shared->reserved2[i % 7] = -1;
		raw_put(&r, wrong);
		EXPECT(enter(r.fd, MP_ENTER_SUBMIT), 1);
		EXPECT(raw_take(&r).cookie, 77);
	}
	EXPECT(r.shared->sq_head, r.sq_tail);
	EXPECT(r.shared->cq_tail, r.cq_head);
	/* Untaken: up to 4 in the ring, and back again. */
	for (int i = 0; i < 4; i++) {
		raw_put(&r, wrong);
		EXPECT(enter(r.fd, MP_ENTER_SUBMIT), 1);
	}
	raw_put(&r, wrong);
	EXPECT(enter(r.fd, MP_ENTER_SUBMIT), 0);
	r.shared->cq_head = r.cq_head - 1;
	EXPECT(enter(r.fd, MP_ENTER_SUBMIT), -EBADMSG);
	r.shared->cq_head = r.cq_head + 5;
	EXPECT(enter(r.fd, MP_ENTER_SUBMIT), -EBADMSG);
	r.shared->cq_head = r.cq_head + 4;
	EXPECT(enter(r.fd, MP_ENTER_SUBMIT), 1);
	raw_close(&r);
}

static void test_requests(void)
{
	struct raw r = raw_channel(4, 4);
	struct pair p = tcp_pair(0);
	int listener = listening();
	static char buffer[8];
	const struct mp_request good[] = {
		{ .op = MP_OP_UNREGISTER }, { .op = MP_OP_ACCEPT, .len = 1 },
		{ .op = MP_OP_READ, .addr = (uintptr_t)buffer, .len = 1 },
		{ .op = MP_OP_WRITE, .addr = (uintptr_t)buffer, .len = 1 },
		{ .op = MP_OP_WRITEV, .addr = (uintptr_t)buffer, .len = 0 },
		{ .op = MP_OP_DISCONNECT },
		{ .op = MP_OP_CONVERT },
	};
	const int allowed[] = {
		0, MP_ACCEPT_LWSOCKET, MP_AT_OFFSET, MP_AT_OFFSET, MP_AT_OFFSET, 0, 0
	};
	struct mp_request bad;

	for (unsigned int op = MP_NR_OPS; op < 256; op++)
		EXPECT(raw_do(&r, (struct mp_request){ .op = op, .handle = ~op }).result, -EINVAL);
	raw_register(&r, 0, p.mine);
	for (size_t i = 0; i < sizeof(good) / sizeof(*good); i++) {
		for (int bit = 0; bit < 24; bit++) {
			bad = good[i];
			if (bit < 8 && 1 << bit == allowed[i])
				continue;
			if (bit < 8)
				bad.flags = 1 << bit;
			else
				bad.reserved = 1 << (bit - 8);
			EXPECT(raw_do(&r, bad).result, -EINVAL);
		}
		bad = good[i];
		bad.cookie = 1;
		EXPECT(raw_do(&r, bad).result, -EINVAL);
		bad = good[i];
		bad.fd = -1;
		EXPECT(raw_do(&r, bad).result, -EINVAL);
		bad = good[i];
		if (!bad.addr && bad.op != MP_OP_WRITEV) {
			bad.addr = 1;
			EXPECT(raw_do(&r, bad).result, -EINVAL);
		}
		bad = good[i];
		if (bad.op == MP_OP_UNREGISTER || bad.op >= MP_OP_DISCONNECT) {
			bad.len = 1;
			EXPECT(raw_do(&r, bad).result, -EINVAL);
		}
		bad = good[i];
		for (uint32_t handle = 1; handle; handle <<= 1) {
			bad.handle = handle;
			EXPECT(raw_do(&r, bad).result, -ENOENT);
		}
	}
	bad = (struct mp_request){ .op = MP_OP_REGISTER, .fd = p.mine, .cookie = 0x1234 };
	EXPECT(raw_do(&r, bad).result, -EEXIST);
	bad.handle = MP_MAX_HANDLES;
	EXPECT(raw_do(&r, bad).result, -EINVAL);
	bad.handle = UINT32_MAX;
	EXPECT(raw_do(&r, bad).cookie, 0x1234);
	bad.handle = 1;
	bad.flags = 1;
	EXPECT(raw_do(&r, bad).result, -EINVAL);
	/* The highest number. */
	raw_register(&r, MP_MAX_HANDLES - 1, listener);
	EXPECT(raw_do(&r, (struct mp_request){ .op = MP_OP_UNREGISTER,
					       .handle = MP_MAX_HANDLES - 1 }).result, 0);
	/* Reading into the rings themselves is a strange wish, no more. */
	peer_sends(&p, "abcdefghabcdefgh");
	bad = (struct mp_request){
		.op = MP_OP_READ, .addr = (uintptr_t)r.sq, .len = 32 };
	EXPECT(raw_do(&r, bad).result, 16);
	raw_close(&r);
	end_pair(&p);
	close(listener);
}

static void test_wait_raw(void)
{
	struct raw r = raw_channel(4, 4);
	const int64_t soon[] = { 0, 1, 999, 1000000 };
	const int64_t later[] = { -1, INT64_MIN, INT64_MAX, INT64_MAX - 1, 1LL << 62 };

	for (size_t i = 0; i < sizeof(soon) / sizeof(*soon); i++)
		EXPECT(raw_wait(&r, 0, soon[i]), 0);
	for (size_t i = 0; i < sizeof(later) / sizeof(*later); i++) {
		set_timer(20, false);
		EXPECT(raw_wait(&r, 0, later[i]), -EINTR);
	}
	raw_close(&r);
}

/* --- everything at random ------------------------------------------------------------------ */

static void test_random_requests(void)
{
	struct arena *a = malloc(sizeof(*a));
	uint64_t seed = 0x1234567 + batch;

	reserve_descriptors();
	arena_make(a, 0);
	set_timer(100, true);
	for (int i = 0; i < 1500 * scale; i++) {
		arena_requests(a, &seed);
		arena_cross(a, &seed);
		if (i % 4 == 0)
			arena_stir(a, &seed);
	}
	if (a->refused)
		fail("expected right indices to be accepted, %lu crossings were refused",
		     a->refused);
	TRUE(a->done > 100);
	arena_end(a);
	free(a);
}

static void test_scribble(void)
{
	struct arena *a = malloc(sizeof(*a));
	uint64_t seed = 0x7654321 + batch, end = now_ns() + 1500000000ULL * scale;
	pthread_t threads[2];

	reserve_descriptors();
	arena_make(a, 0);
	for (int i = 0; i < 2; i++)
		threads[i] = start(arena_scribble, a);
	/* A time-out that was scribbled over may be long. */
	set_timer(20, true);
	/* A slow kernel gets more time, but not for ever. */
	for (int i = 0; now_ns() < end || (!a->done && now_ns() < end + 15000000000ULL); i++) {
		arena_cross(a, &seed);
		if (i % 4 == 0)
			arena_stir(a, &seed);
	}
	atomic_store(&a->over, true);
	for (int i = 0; i < 2; i++)
		join(threads[i]);
	if (!a->done)
		fail("expected requests to be taken in between, none was; %lu crossings were refused",
		     a->refused);
	/* And now in order: the channel has survived. */
	for (int i = 0; i < 16; i++)
		a->r.sq[i] = (struct mp_request){ .op = 99 };
	arena_cross(a, &seed);
	arena_end(a);
	free(a);
}

const struct test_case attacks_cases[] = {
	{ "ioctls", test_ioctls },
	{ "create-raw", test_create_raw },
	{ "mmap", test_mmap },
	{ "indices", test_indices },
	{ "requests", test_requests },
	{ "wait-raw", test_wait_raw },
	{ "random-requests", test_random_requests },
	{ "scribble", test_scribble },
	{ }
};
