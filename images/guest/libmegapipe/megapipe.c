/*
 * libmegapipe: handle numbers, the two rings as user space sees them, and one
 * function per call. When to cross into the kernel is decided behind flush.h.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "channel.h"
#include "flush.h"

enum { DEFAULT_REQUESTS = 256, DEFAULT_COMPLETIONS = 4096, DEFAULT_THRESHOLD = 32 };

/* --- the rings ---------------------------------------------------------------- */

int mp_cross(struct mp_channel *ch, unsigned int flags, int timeout_ms)
{
	int ret;

	if (flags & MP_ENTER_WAIT)
		ch->shared->timeout_ns = timeout_ms < 0 ? -1 : timeout_ms * 1000000LL;
	ret = ioctl(ch->fd, MP_IOC_ENTER, (unsigned long)flags);
	return ret < 0 ? -errno : ret;
}

static const struct mp_completion *first_completion(const struct mp_channel *ch)
{
	return &ch->cq[ch->cq_head & ch->cq_mask];
}

static void release_completion(struct mp_channel *ch)
{
	ch->cq_head++;
	/* Release: the slot has been read. */
	__atomic_store_n(&ch->shared->cq_head, ch->cq_head, __ATOMIC_RELEASE);
}

/* Nobody will see this completion: the descriptor that it may bring must not stay open. */
static void discard(const struct mp_completion *c)
{
	/* An lwsocket goes with its channel, if not before: see deliver(). */
	if (c->op == MP_OP_ACCEPT && c->result >= 0 && !mp_is_lwsocket(c->result))
		close(c->result);
	if (c->op == MP_OP_CONVERT && c->result >= 0)
		close(c->result);
}

static int set_completions_aside(struct mp_channel *ch)
{
	unsigned int count = mp_completions_waiting(ch);
	size_t need = ch->aside_count + count;

	if (ch->aside_first) {
		memmove(ch->aside, ch->aside + ch->aside_first,
			ch->aside_count * sizeof(*ch->aside));
		ch->aside_first = 0;
	}
	if (need > ch->aside_size) {
		struct mp_completion *more = realloc(ch->aside, 2 * need * sizeof(*more));

		if (!more)
			return -ENOMEM;
		ch->aside = more;
		ch->aside_size = 2 * need;
	}
	while (count--) {
		ch->aside[ch->aside_count++] = *first_completion(ch);
		release_completion(ch);
	}
	return 0;
}

/* Make room for a request. */
static int make_room(struct mp_channel *ch)
{
	int ret;

	while (mp_requests_waiting(ch) > ch->sq_mask) {
		ret = mp_cross(ch, MP_ENTER_SUBMIT, 0);
		if (ret < 0)
			return ret;
		if (ret == 0) {
			if (!mp_completions_waiting(ch))	/* then what is in the way? */
				return -EBADMSG;
			ret = set_completions_aside(ch);
			if (ret)
				return ret;
		}
	}
	return 0;
}

static inline int request(struct mp_channel *ch, struct mp_request req)
{
	if (mp_requests_waiting(ch) > ch->sq_mask) {
		int ret = make_room(ch);

		if (ret)
			return ret;
	}
	ch->sq[ch->sq_tail & ch->sq_mask] = req;
	ch->sq_tail++;
	/* Release: the request is written. Pairs with the kernel's acquire. */
	__atomic_store_n(&ch->shared->sq_tail, ch->sq_tail, __ATOMIC_RELEASE);
	return ch->flush->queued(ch);
}

int mp_flush(struct mp_channel *ch)
{
	while (mp_requests_waiting(ch)) {
		int ret = mp_cross(ch, MP_ENTER_SUBMIT, 0);

		if (ret < 0)
			return ret;
		if (ret == 0)
			return -EAGAIN;
	}
	return 0;
}

/* --- channels ----------------------------------------------------------------- */

struct mp_channel *mp_create(const struct mp_options *options)
{
	struct mp_options o = { 0 };
	struct mp_create args;
	struct mp_channel *ch;
	void *memory;
	int device;

	if (options)
		o = *options;
	args = (struct mp_create){
		.sq_entries = o.requests ? o.requests : DEFAULT_REQUESTS,
		.cq_entries = o.completions ? o.completions : DEFAULT_COMPLETIONS,
		.flags = o.flags,
	};
	ch = calloc(1, sizeof(*ch));
	if (!ch)
		return NULL;
	device = open("/dev/megapipe", O_RDWR | O_CLOEXEC);
	if (device < 0)
		goto err_free;
	ch->fd = ioctl(device, MP_IOC_CREATE, &args);
	close(device);
	if (ch->fd < 0)
		goto err_free;
	memory = mmap(NULL, args.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ch->fd, 0);
	if (memory == MAP_FAILED)
		goto err_close;

	ch->pid = getpid();
	ch->flush = o.flags & MP_BATCH ? &mp_batched_flush : &mp_plain_flush;
	ch->threshold = o.threshold ? o.threshold : DEFAULT_THRESHOLD;
	if (ch->threshold > args.sq_entries)
		ch->threshold = args.sq_entries;
	ch->shared = memory;
	ch->shared_bytes = args.bytes;
	ch->sq = (void *)((char *)memory + args.sq_offset);
	ch->cq = (void *)((char *)memory + args.cq_offset);
	ch->sq_mask = args.sq_entries - 1;
	ch->cq_mask = args.cq_entries - 1;
	ch->free_handle = -1;
	return ch;

err_close:
	close(ch->fd);
err_free:
	free(ch);
	return NULL;
}

void mp_close(struct mp_channel *ch)
{
	if (!ch)
		return;
	/* A forked child has neither: there the same numbers may be something else. */
	if (getpid() == ch->pid) {
		while (ch->aside_count--)
			discard(&ch->aside[ch->aside_first++]);
		/* More than the ring holds: its indices were scribbled over. */
		if (mp_completions_waiting(ch) <= ch->cq_mask + 1) {
			while (mp_completions_waiting(ch)) {
				discard(first_completion(ch));
				release_completion(ch);
			}
		}
		munmap(ch->shared, ch->shared_bytes);
		close(ch->fd);
	}
	free(ch->handles);
	free(ch->aside);
	free(ch);
}

/* --- handles ------------------------------------------------------------------- */

static int handle_alloc(struct mp_channel *ch)
{
	int handle = ch->free_handle;

	if (handle < 0) {
		int count = ch->nr_handles ? 2 * ch->nr_handles : 64;
		struct handle *more;

		if (ch->nr_handles == MP_MAX_HANDLES)
			return -ENFILE;
		more = realloc(ch->handles, count * sizeof(*more));
		if (!more)
			return -ENOMEM;
		for (handle = count - 1; handle >= ch->nr_handles; handle--) {
			more[handle] = (struct handle){ HANDLE_FREE, ch->free_handle };
			ch->free_handle = handle;
		}
		handle = ch->free_handle;
		ch->handles = more;
		ch->nr_handles = count;
	}
	ch->free_handle = ch->handles[handle].next_free;
	ch->handles[handle].state = HANDLE_USED;
	return handle;
}

static void handle_free(struct mp_channel *ch, int handle)
{
	ch->handles[handle] = (struct handle){ HANDLE_FREE, ch->free_handle };
	ch->free_handle = handle;
}

static bool handle_used(const struct mp_channel *ch, int handle)
{
	return handle >= 0 && handle < ch->nr_handles && ch->handles[handle].state == HANDLE_USED;
}

int mp_register(struct mp_channel *ch, int fd, void *cookie, const void *mask, size_t mask_bytes)
{
	int handle = handle_alloc(ch);
	struct mp_request req = {
		.op = MP_OP_REGISTER,
		.handle = handle,
		.cookie = (uintptr_t)cookie,
		.addr = (uintptr_t)mask,
		.len = mask_bytes > UINT32_MAX ? UINT32_MAX : mask_bytes,
		.fd = fd,
	};
	int ret;

	if (handle < 0)
		return handle;
	ret = request(ch, req);
	if (ret) {
		handle_free(ch, handle);
		return ret;
	}
	return handle;
}

static int request_on(struct mp_channel *ch, enum mp_op op, int handle, const void *buffer,
		      size_t size)
{
	struct mp_request req = {
		.op = op,
		.handle = handle,
		.addr = (uintptr_t)buffer,
		.len = size > UINT32_MAX ? UINT32_MAX : size,
	};

	return handle_used(ch, handle) ? request(ch, req) : -EBADF;
}

int mp_unregister(struct mp_channel *ch, int handle)
{
	int ret = request_on(ch, MP_OP_UNREGISTER, handle, NULL, 0);

	/* The number is free when the kernel says so: see deliver(). */
	if (!ret)
		ch->handles[handle].state = HANDLE_LEAVING;
	return ret;
}

int mp_accept(struct mp_channel *ch, int handle, unsigned int count, bool is_lwsocket)
{
	struct mp_request req = {
		.op = MP_OP_ACCEPT,
		.flags = is_lwsocket ? MP_ACCEPT_LWSOCKET : 0,
		.handle = handle,
		.len = count,
	};

	return handle_used(ch, handle) ? request(ch, req) : -EBADF;
}

int mp_read(struct mp_channel *ch, int handle, void *buffer, size_t size)
{
	return request_on(ch, MP_OP_READ, handle, buffer, size);
}

int mp_write(struct mp_channel *ch, int handle, const void *buffer, size_t size)
{
	return request_on(ch, MP_OP_WRITE, handle, buffer, size);
}

int mp_writev(struct mp_channel *ch, int handle, const struct iovec *buffers, unsigned int count)
{
	return request_on(ch, MP_OP_WRITEV, handle, buffers, count);
}

static int request_at(struct mp_channel *ch, enum mp_op op, int handle, const void *buffer,
		      size_t size, int64_t offset)
{
	struct mp_request req = {
		.op = op,
		.flags = MP_AT_OFFSET,
		.handle = handle,
		.cookie = offset,
		.addr = (uintptr_t)buffer,
		.len = size > UINT32_MAX ? UINT32_MAX : size,
	};

	return handle_used(ch, handle) ? request(ch, req) : -EBADF;
}

int mp_pread(struct mp_channel *ch, int handle, void *buffer, size_t size, int64_t offset)
{
	return request_at(ch, MP_OP_READ, handle, buffer, size, offset);
}

int mp_pwrite(struct mp_channel *ch, int handle, const void *buffer, size_t size, int64_t offset)
{
	return request_at(ch, MP_OP_WRITE, handle, buffer, size, offset);
}

int mp_disconnect(struct mp_channel *ch, int handle)
{
	return request_on(ch, MP_OP_DISCONNECT, handle, NULL, 0);
}

int mp_convert(struct mp_channel *ch, int handle)
{
	return request_on(ch, MP_OP_CONVERT, handle, NULL, 0);
}

int mp_drop(struct mp_channel *ch, int lwsocket)
{
	struct mp_request req = { .op = MP_OP_DROP, .fd = lwsocket };

	return mp_is_lwsocket(lwsocket) ? request(ch, req) : -EBADF;
}

/* --- events -------------------------------------------------------------------- */

/*
 * Returns 1 if this completion is for the application, 0 if not, or the lwsocket
 * that came with it and has to be dropped.
 */
static int deliver(struct mp_channel *ch, const struct mp_completion *c, struct mp_event *event)
{
	if (c->op == MP_OP_DROP)	/* comes only if it failed: it was gone */
		return 0;
	if (c->handle >= (unsigned int)ch->nr_handles)
		return 0;
	if (ch->handles[c->handle].state == HANDLE_LEAVING) {
		/* Whatever came before the handle was out is dropped. */
		if (c->op == MP_OP_UNREGISTER)
			handle_free(ch, c->handle);
		else if (c->op == MP_OP_ACCEPT && c->result >= 0 && mp_is_lwsocket(c->result))
			return c->result;
		else
			discard(c);
		return 0;
	}
	*event = (struct mp_event){
		.cookie = (void *)(uintptr_t)c->cookie,
		.handle = c->handle,
		.op = c->op,
		.result = c->result,
		.error = c->error,
		.queued = c->queued,
		.more = c->flags & MP_MORE,
	};
	return 1;
}

static long long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

int mp_dispatch(struct mp_channel *ch, struct mp_event *event, int timeout_ms)
{
	long long deadline = timeout_ms > 0 ? now_ms() + timeout_ms : 0;
	int delivered, ret;

	for (;;) {
		if (ch->aside_count) {
			delivered = deliver(ch, &ch->aside[ch->aside_first++], event);
			if (!--ch->aside_count)
				ch->aside_first = 0;
		} else {
			ret = ch->flush->next(ch, timeout_ms);
			if (ret <= 0)
				return ret;
			delivered = deliver(ch, first_completion(ch), event);
			release_completion(ch);
		}
		if (delivered == 1)
			return 1;
		/* The completion is out: to make room for the request may set aside what is in. */
		if (delivered)
			mp_drop(ch, delivered);
		/* What was dropped took its time, too. */
		if (timeout_ms > 0) {
			long long left = deadline - now_ms();

			timeout_ms = left > 0 ? left : 0;
		}
	}
}
