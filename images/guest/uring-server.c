/*
 * io_uring, as good as we know it on Linux 6.12: one pinned thread per CPU with
 * a ring of its own, and one system call for each batch. io_uring_enter() hands
 * over the sends that the last batch of receives has led to, executes them, and
 * waits for the next batch.
 *
 * What was tried, in instructions per transaction, as ratios to this design
 * without POLL_FIRST (64 bytes, 256 connections in rounds, 4 vCPUs, each
 * measured 4 times in turn; n is the number of transactions per connection; a
 * ratio is good to about 2 %, to 4 % where it has a ~):
 *
 *						n = 1	n = 10
 *	epoll-server				1.06	1.04
 *	epoll-server --reuseport		1.06	1.03
 *	single-shot receives			1.01 ~	1.05
 *	COOP_TASKRUN, not DEFER_TASKRUN		0.99 ~	1.02
 *	ring by its descriptor, unregistered	1.00	1.01
 *	sends that complete with an event	0.99	1.00
 *	receive bundles				1.00	1.00
 *	direct descriptors			1.00 ~	1.00
 *	receives with POLL_FIRST		0.98	1.00
 *
 * So epoll and, at n = 10, single-shot receives are worse beyond doubt, and
 * POLL_FIRST is better at n = 1 (0.99 when measured again). Between the others
 * the reasons decide:
 *
 * - Ordinary descriptors. In 6.12 the ring lets go of the files behind direct
 *   descriptors in the order in which they were closed, and a file not before
 *   every request on a direct descriptor that is older than its close has
 *   ended (io_rsrc_node_ref_zero()). A multishot receive lasts as long as its
 *   connection: one that idles keeps open all sockets closed after it, and
 *   their clients wait for the FIN (tried; a test has this case).
 * - Sends without events: see send_piece(). A send with one costs 30 more user
 *   instructions, of some 210.
 * - POLL_FIRST: a connection seldom has data already when it is accepted.
 * - A buffer is consumed whole. With IOU_PBUF_RING_INC several receives share
 *   one, which spares giving back a buffer each time, a few of those user
 *   instructions, but asks for counting its users. Not measured.
 * - No TASKRUN_FLAG: it tells those who look before they enter the kernel, and
 *   this loop always enters. No min_wait: it buys larger batches with latency.
 *   No SQPOLL and no NAPI busy polling: they burn a CPU while nothing happens.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common/server.h"

enum {
	SQ_ENTRIES = 1024,
	CQ_ENTRIES = 8192,
	/* Of one thread's buffers, if --buffers does not say how many. */
	BUFFER_MEMORY = 8 << 20,
	MIN_BUFFERS = 16,
	MAX_BUFFERS = 4096,
	BUFFER_GROUP = 0,
	/* With more than this to send to a client that does not read, nothing more is received. */
	MAX_WAITING = 256 << 10,
	NONE = -1,
};

/* In the low bits of user_data, which malloc() leaves free; the rest is the connection. */
enum operation { ACCEPT, RECEIVE, SEND, SEND_WAITING, OTHER, OPERATION_BITS = 7 };

/* What one receive has brought: the buffer of the same number, in its connection's queue. */
struct piece {
	int length;
	int next;		/* or NONE */
};

/* Bytes that could not be sent at once. A copy: a buffer never waits for a client. */
struct waiting {
	char *bytes;
	size_t length, size;
};

struct connection {
	int fd;
	int first, last;	/* pieces; first is NONE if there are none */
	bool receiving;		/* its receive is armed */
	bool pausing;		/* and is being cancelled */
	bool starved;		/* its receive has ended for want of a buffer */
	bool sending;		/* the first piece: has been sent unless a completion says no */
	bool blocked;		/* a send of out waits for the client */
	bool ended;		/* the client sends no more */
	bool broken;		/* nothing can be sent any more */
	bool cancelled;		/* and whatever was pending has been told so */
	bool listed;		/* in the list of those to advance */
	struct connection *next_to_advance, *next_sending, *next_starved;
	struct waiting out, more;	/* the kernel reads out; what follows gathers in more */
};

struct worker {
	const struct server_options *options;
	int listener;
	int connections;
	bool accepting;		/* an accept is armed */
	bool full;		/* no descriptor is left: accept when some have come back */
	bool hurry;		/* what is being submitted leads to more: do not sleep */

	int ring;		/* number of its registration */
	struct io_uring_sqe *sqes;
	unsigned int *sq_head, *sq_tail, *sq_flags, sq_mask;
	unsigned int prepared;	/* the tail that the kernel sees at the next submit() */
	struct io_uring_cqe *cqes;
	unsigned int *cq_head, *cq_tail, cq_mask;

	struct io_uring_buf_ring *buffers;
	unsigned int buffer_mask;
	uint16_t given_back;	/* the tail that the kernel sees at the next publish_buffers() */
	char *memory;
	struct piece *pieces;

	struct connection *to_advance, *sending, *starved;
};

/* ---- submission ---- */

/* Hand over all that is prepared, and wait for so many completions. */
static void submit(struct worker *w, unsigned int wait)
{
	__atomic_store_n(w->sq_tail, w->prepared, __ATOMIC_RELEASE);
	do {
		unsigned int count = w->prepared - *w->sq_head;

		/* EAGAIN: no memory for a request. EBADR, a lost completion, is the end. */
		if (syscall(__NR_io_uring_enter, w->ring, count, wait,
			    IORING_ENTER_GETEVENTS | IORING_ENTER_REGISTERED_RING, NULL, 0) < 0 &&
		    errno != EINTR && errno != EAGAIN)
			server_fail("io_uring_enter", errno);
		wait = 0;
	} while (__atomic_load_n(w->sq_head, __ATOMIC_ACQUIRE) != w->prepared);
}

static struct io_uring_sqe *prepare(struct worker *w, enum operation operation,
				    struct connection *c)
{
	struct io_uring_sqe *sqe;

	if (w->prepared - __atomic_load_n(w->sq_head, __ATOMIC_ACQUIRE) > w->sq_mask)
		submit(w, 0);
	sqe = &w->sqes[w->prepared++ & w->sq_mask];
	*sqe = (struct io_uring_sqe){ .user_data = (uintptr_t)c | operation };
	return sqe;
}

static void arm_accept(struct worker *w)
{
	struct io_uring_sqe *sqe = prepare(w, ACCEPT, NULL);

	sqe->opcode = IORING_OP_ACCEPT;
	sqe->fd = w->listener;
	sqe->ioprio = IORING_ACCEPT_MULTISHOT;
	sqe->accept_flags = SOCK_CLOEXEC;
	w->accepting = true;
}

static void arm_receive(struct worker *w, struct connection *c)
{
	struct io_uring_sqe *sqe = prepare(w, RECEIVE, c);

	sqe->opcode = IORING_OP_RECV;
	sqe->fd = c->fd;
	sqe->flags = IOSQE_BUFFER_SELECT;
	sqe->ioprio = IORING_RECV_MULTISHOT | IORING_RECVSEND_POLL_FIRST;
	sqe->buf_group = BUFFER_GROUP;
	c->receiving = true;
	c->pausing = false;
}

/* What arrives before the receive has ended is taken all the same. */
static void pause_receive(struct worker *w, struct connection *c)
{
	struct io_uring_sqe *sqe;

	if (!c->receiving || c->pausing)
		return;
	sqe = prepare(w, OTHER, NULL);
	sqe->opcode = IORING_OP_ASYNC_CANCEL;
	sqe->addr = (uintptr_t)c | RECEIVE;
	sqe->flags = IOSQE_CQE_SKIP_SUCCESS;
	c->pausing = true;
}

static void cancel_all(struct worker *w, struct connection *c)
{
	struct io_uring_sqe *sqe;

	if (c->cancelled || !(c->receiving || c->blocked))
		return;
	sqe = prepare(w, OTHER, NULL);
	sqe->opcode = IORING_OP_ASYNC_CANCEL;
	sqe->fd = c->fd;
	sqe->cancel_flags = IORING_ASYNC_CANCEL_FD | IORING_ASYNC_CANCEL_ALL;
	c->cancelled = true;
}

/* ---- buffers ---- */

static char *bytes_of(const struct worker *w, int piece)
{
	return w->memory + (size_t)piece * w->options->buffer;
}

static void give_back(struct worker *w, int piece)
{
	struct io_uring_buf *b = &w->buffers->bufs[w->given_back++ & w->buffer_mask];

	/* Member by member: the first one's padding is the tail of the ring. */
	b->addr = (uintptr_t)bytes_of(w, piece);
	b->len = w->options->buffer;
	b->bid = piece;
}

static void publish_buffers(struct worker *w)
{
	__atomic_store_n(&w->buffers->tail, w->given_back, __ATOMIC_RELEASE);
}

static int take_piece(struct worker *w, struct connection *c)
{
	int piece = c->first;

	c->first = w->pieces[piece].next;
	return piece;
}

static bool append(struct waiting *waiting, const char *bytes, size_t length)
{
	if (waiting->length + length > waiting->size) {
		size_t size = 2 * (waiting->length + length);
		char *grown = realloc(waiting->bytes, size);

		if (!grown)
			return false;
		waiting->bytes = grown;
		waiting->size = size;
	}
	memcpy(waiting->bytes + waiting->length, bytes, length);
	waiting->length += length;
	return true;
}

static void drop(struct waiting *waiting)
{
	free(waiting->bytes);
	*waiting = (struct waiting){ };
}

/* Move the first piece, without the part that has been sent, to where it may wait. */
static void keep_piece(struct worker *w, struct connection *c, int sent)
{
	int piece = take_piece(w, c);

	if (!append(&c->more, bytes_of(w, piece) + sent, w->pieces[piece].length - sent))
		c->broken = true;
	give_back(w, piece);
}

/* ---- connections ---- */

static void advance_later(struct worker *w, struct connection *c)
{
	if (c->listed)
		return;
	c->listed = true;
	c->next_to_advance = w->to_advance;
	w->to_advance = c;
}

/*
 * MSG_DONTWAIT: done within the system call, or not at all. With MSG_WAITALL a short send is a
 * failure, too, and failures alone complete: when the completions of this submission have been
 * seen, a send without one has taken all its bytes, and its buffer is free.
 */
static void send_piece(struct worker *w, struct connection *c)
{
	struct io_uring_sqe *sqe = prepare(w, SEND, c);
	const struct piece *piece = &w->pieces[c->first];

	sqe->opcode = IORING_OP_SEND;
	sqe->fd = c->fd;
	sqe->flags = IOSQE_CQE_SKIP_SUCCESS;
	sqe->addr = (uintptr_t)bytes_of(w, c->first);
	sqe->len = piece->length;
	sqe->msg_flags = MSG_DONTWAIT | MSG_WAITALL;
	c->sending = true;
	c->next_sending = w->sending;
	w->sending = c;
	if (piece->next != NONE || !c->receiving)
		w->hurry = true;
}

/* One at a time for each connection, as send_piece(): so the bytes stay in order. */
static void send_waiting(struct worker *w, struct connection *c)
{
	struct io_uring_sqe *sqe = prepare(w, SEND_WAITING, c);

	c->out = c->more;
	c->more = (struct waiting){ };
	sqe->opcode = IORING_OP_SEND;
	sqe->fd = c->fd;
	sqe->addr = (uintptr_t)c->out.bytes;
	sqe->len = c->out.length;
	sqe->msg_flags = MSG_WAITALL;
	c->blocked = true;
}

/* No operation is pending on it. */
static void end_connection(struct worker *w, struct connection *c)
{
	struct io_uring_sqe *sqe = prepare(w, OTHER, NULL);

	sqe->opcode = IORING_OP_CLOSE;
	sqe->fd = c->fd;
	sqe->flags = IOSQE_CQE_SKIP_SUCCESS;
	drop(&c->more);
	server_connection_put(c);
	w->connections--;
	w->full = false;
}

/* Do what is next for a connection. All completions so far have been seen. */
static void advance(struct worker *w, struct connection *c)
{
	c->listed = false;
	if (c->sending || c->starved)
		return;
	if (!c->broken && (c->blocked || c->more.length)) {
		while (c->first != NONE)
			keep_piece(w, c, 0);
		if (c->more.length > MAX_WAITING)
			pause_receive(w, c);
	}
	if (c->broken) {
		while (c->first != NONE)
			give_back(w, take_piece(w, c));
		if (c->receiving || c->blocked)
			cancel_all(w, c);
		else
			end_connection(w, c);
	} else if (c->blocked) {
		return;
	} else if (c->more.length) {
		send_waiting(w, c);
	} else if (c->first != NONE) {
		send_piece(w, c);
	} else if (c->ended) {
		end_connection(w, c);
	} else if (!c->receiving) {
		arm_receive(w, c);
	}
}

/* ---- completions ---- */

static void accepted(struct worker *w, const struct io_uring_cqe *cqe)
{
	struct connection *c;

	if (!(cqe->flags & IORING_CQE_F_MORE)) {
		/* To ask again at once would only fail again. */
		w->full = w->connections && (cqe->res == -EMFILE || cqe->res == -ENFILE);
		w->accepting = false;
	}
	if (cqe->res < 0)	/* or aborted meanwhile */
		return;
	c = server_connection_get(sizeof(*c));
	if (!c) {
		close(cqe->res);
		return;
	}
	*c = (struct connection){ .fd = cqe->res, .first = NONE };
	w->connections++;
	arm_receive(w, c);
}

static void received(struct worker *w, const struct io_uring_cqe *cqe, struct connection *c)
{
	/* A full completion queue, too, ends the multishot: advance() arms it anew. */
	if (!(cqe->flags & IORING_CQE_F_MORE))
		c->receiving = false;
	if (cqe->res > 0) {
		int piece = cqe->flags >> IORING_CQE_BUFFER_SHIFT;

		w->pieces[piece] = (struct piece){ .length = cqe->res, .next = NONE };
		if (c->first == NONE)
			c->first = piece;
		else
			w->pieces[c->last].next = piece;
		c->last = piece;
	} else if (cqe->res == -ENOBUFS) {
		c->starved = true;
		c->next_starved = w->starved;
		w->starved = c;
	} else if (cqe->res == 0) {
		c->ended = true;
	} else if (cqe->res != -ECANCELED) {
		c->broken = true;
	}
	advance_later(w, c);
}

static void not_sent(struct worker *w, const struct io_uring_cqe *cqe, struct connection *c)
{
	c->sending = false;
	if (cqe->res >= 0 || cqe->res == -EAGAIN)
		keep_piece(w, c, cqe->res < 0 ? 0 : cqe->res);
	else
		c->broken = true;
	advance_later(w, c);
}

static void waiting_sent(struct worker *w, const struct io_uring_cqe *cqe, struct connection *c)
{
	c->blocked = false;
	if (cqe->res < 0 || (size_t)cqe->res < c->out.length)
		c->broken = true;
	drop(&c->out);
	advance_later(w, c);
}

static void handle(struct worker *w, const struct io_uring_cqe *cqe)
{
	struct connection *c = (void *)(uintptr_t)(cqe->user_data & ~(uint64_t)OPERATION_BITS);

	switch ((enum operation)(cqe->user_data & OPERATION_BITS)) {
	case ACCEPT:
		accepted(w, cqe);
		break;
	case RECEIVE:
		received(w, cqe, c);
		break;
	case SEND:
		not_sent(w, cqe, c);
		break;
	case SEND_WAITING:
		waiting_sent(w, cqe, c);
		break;
	default:		/* a cancellation; there was nothing left to cancel */
		break;
	}
}

static void handle_all(struct worker *w)
{
	unsigned int head = *w->cq_head, tail;

	while ((tail = __atomic_load_n(w->cq_tail, __ATOMIC_ACQUIRE)) != head) {
		while (head != tail)
			handle(w, &w->cqes[head++ & w->cq_mask]);
		__atomic_store_n(w->cq_head, head, __ATOMIC_RELEASE);
	}
}

static void sends_have_succeeded(struct worker *w)
{
	while (w->sending) {
		struct connection *c = w->sending;

		w->sending = c->next_sending;
		if (!c->sending)	/* not_sent() */
			continue;
		c->sending = false;
		give_back(w, take_piece(w, c));
		if (c->first != NONE || !c->receiving)
			advance_later(w, c);
	}
}

static void serve_batch(struct worker *w)
{
	struct connection *starved = w->starved;

	submit(w, !w->hurry && !starved);
	w->hurry = false;
	w->starved = NULL;
	handle_all(w);
	/* The queue was full, and the kernel holds more: it comes with the next system call. */
	while (__atomic_load_n(w->sq_flags, __ATOMIC_RELAXED) & IORING_SQ_CQ_OVERFLOW) {
		submit(w, 0);
		handle_all(w);
	}
	sends_have_succeeded(w);
	/*
	 * Those of the last batch: the buffers that they lacked are back now. Those of this batch
	 * have to wait until its sends are done.
	 */
	while (starved) {
		struct connection *c = starved;

		starved = c->next_starved;
		c->starved = false;
		advance_later(w, c);
	}
	while (w->to_advance) {
		struct connection *c = w->to_advance;

		w->to_advance = c->next_to_advance;
		advance(w, c);
	}
	/*
	 * Executed after this batch's closes. Before one of them, it could run out of descriptors,
	 * and nobody would ask it for the one that comes back.
	 */
	if (!w->accepting && !w->full)
		arm_accept(w);
	publish_buffers(w);
}

/* ---- set-up ---- */

static void *map(size_t size, int flags, int fd, off_t offset)
{
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, offset);

	if (memory == MAP_FAILED)
		server_fail("mmap", errno);
	return memory;
}

static void do_register(int fd, unsigned int what, void *argument, const char *name)
{
	if (syscall(__NR_io_uring_register, fd, what, argument, 1) < 0)
		server_fail(name, errno);
}

/* Returns its descriptor. */
static int make_ring(struct worker *w)
{
	struct io_uring_params p = {
		.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
			 IORING_SETUP_NO_SQARRAY | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_CQSIZE,
		.cq_entries = CQ_ENTRIES,
	};
	int flags = MAP_SHARED | MAP_POPULATE;
	int fd = syscall(__NR_io_uring_setup, SQ_ENTRIES, &p);
	char *rings;

	if (fd < 0)
		server_fail("io_uring_setup", errno);
	/* One mapping for both rings. */
	rings = map(p.cq_off.cqes + p.cq_entries * sizeof(*w->cqes), flags, fd, IORING_OFF_SQ_RING);
	w->sq_head = (unsigned int *)(rings + p.sq_off.head);
	w->sq_tail = (unsigned int *)(rings + p.sq_off.tail);
	w->sq_flags = (unsigned int *)(rings + p.sq_off.flags);
	w->sq_mask = p.sq_entries - 1;
	w->cq_head = (unsigned int *)(rings + p.cq_off.head);
	w->cq_tail = (unsigned int *)(rings + p.cq_off.tail);
	w->cq_mask = p.cq_entries - 1;
	w->cqes = (struct io_uring_cqe *)(rings + p.cq_off.cqes);
	w->sqes = map(p.sq_entries * sizeof(*w->sqes), flags, fd, IORING_OFF_SQES);
	return fd;
}

static unsigned int number_of_buffers(const struct server_options *o)
{
	unsigned int count = o->buffers ? o->buffers : MAX_BUFFERS;

	if (count & (count - 1))
		server_fail("--buffers: not a power of two", EINVAL);
	while (!o->buffers && count > MIN_BUFFERS && (size_t)count * o->buffer > BUFFER_MEMORY)
		count /= 2;
	return count;
}

static void make_buffers(struct worker *w, int ring)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS;
	unsigned int count = number_of_buffers(w->options);
	struct io_uring_buf_reg reg = { .bgid = BUFFER_GROUP, .ring_entries = count };

	w->memory = map((size_t)count * w->options->buffer, flags, -1, 0);
	w->pieces = map(count * sizeof(*w->pieces), flags, -1, 0);
	w->buffers = map(count * sizeof(*w->buffers->bufs), flags, -1, 0);
	w->buffer_mask = count - 1;
	reg.ring_addr = (uintptr_t)w->buffers;
	do_register(ring, IORING_REGISTER_PBUF_RING, &reg, "IORING_REGISTER_PBUF_RING");
	for (unsigned int i = 0; i < count; i++)
		give_back(w, i);
	publish_buffers(w);
}

/* The thread finds its ring by the registration, without taking a reference each time. */
static void register_ring(struct worker *w, int ring)
{
	struct io_uring_rsrc_update update = { .offset = -1U, .data = ring };

	do_register(ring, IORING_REGISTER_RING_FDS, &update, "IORING_REGISTER_RING_FDS");
	w->ring = update.offset;
	close(ring);
}

static void run(struct server_thread *thread)
{
	struct worker w = { .options = thread->options, .listener = thread->listener };
	int ring = make_ring(&w);

	make_buffers(&w, ring);
	register_ring(&w, ring);
	arm_accept(&w);
	submit(&w, 0);
	server_ready();
	for (;;)
		serve_batch(&w);
}

int main(int argc, char **argv)
{
	return server_main(argc, argv, "Echo server: io_uring.", run);
}
