// SPDX-License-Identifier: GPL-2.0-only
/*
 * loadgen - drives an RPC echo server over TCP and checks every byte of every reply.
 *
 * A transaction is one message of --size bytes and its complete reply, which must be the same
 * bytes. After --transactions-per-connection of them (n) a connection is closed and replaced;
 * with n = 0 connections stay open until the end. One thread, epoll, nothing blocks.
 *
 * Course of a run
 *
 *	warm-up phase, phase, phase, ..., closing
 *
 * n = 0 (unlimited): the warm-up opens all C connections and does --warm-up transactions on
 *	them, one on each connection before a second on any. Phases use the open connections.
 * n > 0: every phase, the warm-up included, opens the connections that it needs and closes
 *	them: N transactions are N/n connections, so N must be a multiple of n.
 *
 * A phase ends when its last transaction is complete, with n > 0 its last connection closed
 * (--close fin: the server's FIN seen), and then nothing has arrived for --quiet milliseconds.
 * Whatever arrives between two phases is accounted to the later one. In an unlimited run a
 * phase spreads its transactions over all connections: none gets a second one while that would
 * leave another without its first.
 *
 * --mode closed: each connection sends its next message when its reply is in.
 * --mode rounds: all connections send one message, and the next round starts when all replies
 *	of this one are in. With n > 0, C connections are opened, do n rounds, are all closed, and
 *	the next C are opened. A round bigger than a tap's queue loses packets: give the tap a
 *	txqueuelen of at least 2 C, and read the drops in the result.
 *
 * Line protocol (--control), so that a controlling process can read counters at exact borders
 *
 *	stdout	ready		the warm-up is done and the system has drained
 *	stdin	go [N]		run a phase of N transactions (none: --transactions or --seconds)
 *	stdout	done JSON	it is done and the system has drained; JSON is the phase
 *	stdin	go [N] | finish	any number of phases, then: close all connections
 *	stdout	result JSON	the last line, however the run ends
 *
 * Commands may be sent ahead. When stdin ends without `finish` the run is given up, so that no
 * load generator outlives its controller. Without --control there is one phase, and stdout has
 * only the JSON.
 *
 * Payload: byte o of transaction t (from 0) on connection c (from 0, in the order of opening):
 *
 *	a = mix(seed + G), b = mix(a + G (c + 1)), k = mix(b + G (t + 1)), l = mix(k ^ a)
 *	word(i) = mix(k + G (i + 1)) ^ l;  the byte is word(o / 8) >> 8 (o % 8)
 *
 * with G = 0x9e3779b97f4a7c15 and mix the finalizer of splitmix64. It is computed as needed at
 * any offset, so no message is ever stored, and a server that has seen some messages cannot
 * compute the next one.
 *
 * Errors: `wrong` bytes in a reply (one error per transaction, with the first such byte),
 * `missing` (the server closed the connection before a reply was complete or while more was to
 * come), `extra` bytes behind a complete reply, `early` bytes for which no request was sent yet,
 * and `connection` (an errno while connecting, transferring or closing). A connection goes on
 * after wrong bytes and is given up after any other error; the transactions that it still owed
 * are counted as failed, and transactions + failed is always the N that was asked for. Bytes
 * that arrive only after this end has sent its RST cannot be seen: use --close fin for that.
 *
 * Results: a phase's network counters are differences over the whole network namespace; its
 * retransmissions are those of the connections themselves (TCP_INFO). When C exceeds --burst, RST
 * at the end of a round or of the run go out in bursts too, for a lost one is not sent again.
 * With --close fin this end is left in TIME_WAIT: where ports run out, use --source or set
 * net.ipv4.tcp_max_tw_buckets to 0 in the namespace.
 *
 * Latency files: one unsigned 64-bit little-endian number of nanoseconds each, in the order of
 * completion; each phase says at which index its samples begin and how many there are.
 * Transactions of the warm-up leave none, connections always do.
 *
 * Exit status: 0 all right; 2 usage; 3 wrong bytes or failed connections; 4 stalled;
 * 5 anything else (interrupted, out of memory, too few descriptors, unwritable file).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define FORMAT_VERSION	1
#define MAX_SIZE	65536
#define MAX_CONNS	200000
#define MAX_SOURCES	64
#define MAX_IFACES	64
#define MAX_STAGE_ERRNOS 32
#define DETAILS		10	/* errors and stuck connections that are described one by one */
#define SLACK		64	/* read this much beyond a reply, to see extra bytes */
#define SEND_CHUNK	16384	/* generated again after a partial write, so not too big */
#define EVENTS		512
#define SPARE_FDS	32
#define NSEC		UINT64_C(1000000000)
#define MSEC		UINT64_C(1000000)
#define NO_LIST		UINT32_MAX
#define CLOSE_PAUSE_NS	2000000	/* between bursts of RST, which nobody sends again if lost */
#define RETRY_NS	(10 * MSEC)

enum status { OK = 0, USAGE = 2, BAD = 3, STALLED = 4, OTHER = 5 };
enum mode { CLOSED, ROUNDS };
enum closing { RST, FIN };
enum state { FREE, CONNECTING, IDLE, PAUSED, BUSY, CLOSING };
enum kind { WRONG, MISSING, EXTRA, EARLY, CONNECTION, KINDS };
enum stage { CONNECT, TRANSFER, CLOSE, NO_STAGE };
/* What an epoll event is about, when it is not a connection. */
enum special { ON_STDIN = 1, ON_SIGNAL, ON_TIMER };
#define SPECIAL		(1ULL << 63)

static const char *const state_names[] = { "free",   "connecting", "idle",
					   "paused", "waiting",	   "closing" };
static const char *const kind_names[] = { "wrong", "missing", "extra", "early", "connection" };
static const char *const stage_names[] = { "connect", "transfer", "close", "" };

static struct {
	struct sockaddr_in to;
	const char *address;
	unsigned int port;
	unsigned int connections;
	uint64_t ramp;
	unsigned int burst;
	uint64_t per_connection;
	uint64_t size;
	bool warm_up_given;
	uint64_t warm_up;
	uint64_t transactions;
	double seconds;
	enum mode mode;
	enum closing close;
	uint64_t seed;
	double stall;
	uint64_t pause_us;
	uint64_t quiet_ms;
	struct sockaddr_in sources[MAX_SOURCES + 1];
	unsigned int n_sources;
	const char *latency_file;
	const char *connect_latency_file;
	uint64_t stop_on_error;
	bool control;
} opt = {
	.connections = 1,
	.burst = 128,
	.per_connection = 1,
	.size = 64,
	.stall = 30,
	.quiet_ms = 50,
	.stop_on_error = 100,
};

struct conn {
	int fd;
	uint32_t generation;	/* tells events of an earlier socket in this slot */
	enum state state;
	bool fresh;		/* counted in .fresh below */
	uint32_t sent, got;	/* bytes of the current transaction */
	uint32_t extra;
	int detail;		/* of this transaction's wrong bytes, or -1 */
	uint32_t phase;		/* in which it last began a transaction */
	uint32_t retrans;	/* already accounted for */
	uint32_t next, prev;	/* in the list of the paused */
	uint64_t number;
	uint64_t transaction;	/* complete ones on this connection */
	uint64_t k, l;
	uint64_t since;		/* connect or first byte sent, in ns */
	uint64_t moved;		/* last progress, in ns */
	uint64_t due;		/* end of the pause */
};

struct detail {
	enum kind kind;
	enum stage stage;
	int error;
	uint64_t connection, transaction, offset;
	int expected, got;	/* -1: none */
	uint64_t count;
};

struct samples {
	FILE *file;
	const char *path;
	uint64_t total;
};

static const struct {
	const char *group, *name;
} counters[] = {
	{ "Tcp:", "ActiveOpens" },	   { "Tcp:", "AttemptFails" },
	{ "Tcp:", "EstabResets" },	   { "Tcp:", "InSegs" },
	{ "Tcp:", "OutSegs" },		   { "Tcp:", "RetransSegs" },
	{ "Tcp:", "InErrs" },		   { "Tcp:", "OutRsts" },
	{ "TcpExt:", "TCPTimeouts" },	   { "TcpExt:", "TCPSynRetrans" },
	{ "TcpExt:", "TCPFastRetrans" },   { "TcpExt:", "TCPLostRetransmit" },
	{ "TcpExt:", "TCPSpuriousRTOs" },  { "TcpExt:", "TCPLossProbes" },
	{ "TcpExt:", "TCPDSACKRecv" },	   { "TcpExt:", "ListenOverflows" },
	{ "TcpExt:", "ListenDrops" },	   { "TcpExt:", "TCPBacklogDrop" },
	{ "TcpExt:", "TCPTimeWaitOverflow" },
};
#define COUNTERS (sizeof(counters) / sizeof(counters[0]))

static const struct {
	const char *name;
	int column;
} columns[] = {
	{ "rx_bytes", 0 }, { "rx_packets", 1 }, { "rx_errors", 2 },  { "rx_dropped", 3 },
	{ "tx_bytes", 8 }, { "tx_packets", 9 }, { "tx_errors", 10 }, { "tx_dropped", 11 },
};
#define COLUMNS (sizeof(columns) / sizeof(columns[0]))

struct network {
	uint64_t snmp[COUNTERS];
	unsigned int n_ifaces;
	struct {
		char name[32];
		uint64_t value[COLUMNS];
	} ifaces[MAX_IFACES];
};

struct phase {
	uint64_t asked;		/* transactions, 0: until the deadline */
	uint64_t deadline;	/* in ns, 0: none */
	uint64_t started, completed, failed;
	uint64_t opened, closed;
	uint64_t sent, received;
	uint64_t partial_reads;
	uint64_t rounds;
	uint64_t retrans;
	uint64_t begin, last, user_us, system_us;
	unsigned int established_max;
	unsigned int first_timers;	/* connections that began one in this phase */
	uint64_t latency_first, latency_count, connect_first, connect_count;
	uint64_t errors[KINDS], wrong_bytes;
	struct detail details[DETAILS];
	int n_details;
	struct {
		enum stage stage;
		int error;
		uint64_t count;
	} failures[MAX_STAGE_ERRNOS];
	int n_failures;
	bool complete;
	struct network before, after;
};

static struct conn *conns;
static uint32_t *free_slots, n_free;
static uint32_t paused_head = NO_LIST, paused_tail = NO_LIST;
/* How many connections are in a state; .open is all that are not FREE. */
static struct {
	unsigned int open, connecting, idle, paused, busy, closing, fresh, established;
} count;
static struct phase *phases;	/* warm-up, phases, closing */
static unsigned int n_phases;
static struct phase *phase;
static bool warming_up, running;
static uint32_t kick_slot = UINT32_MAX;
static uint64_t group_left;	/* rounds, n > 0: still to be opened in this group */
static uint64_t next_number, total_errors;
static uint64_t now, progress, ramp_at, retry_at, timer_armed, event_count;
static unsigned int established_max;
static struct samples latency, connect_latency;
static int epoll_fd, timer_fd;
static char commands[4096];
static size_t n_commands;
static bool input_ended, finishing;
static const char *outcome = "complete";
static enum status status;
static uint64_t *expected_words;
static unsigned char *buffer;

/* ---- Small things ------------------------------------------------------------------------ */

static void say(const char *format, ...)
{
	va_list list;

	fputs("loadgen: ", stderr);
	va_start(list, format);
	vfprintf(stderr, format, list);
	va_end(list);
	fputc('\n', stderr);
}

#define die(code, ...) do { say(__VA_ARGS__); exit(code); } while (0)

static void *allocate(size_t n, size_t each)
{
	void *memory = calloc(n, each);

	if (!memory)
		die(OTHER, "out of memory (%zu bytes)", n * each);
	return memory;
}

static uint64_t read_clock(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * NSEC + (uint64_t)t.tv_nsec;
}

static void stop(const char *why, enum status code)
{
	outcome = why;
	status = code;
	running = false;
}

static bool stopped(void)
{
	return strcmp(outcome, "complete") != 0;
}

/* ---- Payload ----------------------------------------------------------------------------- */

#define GOLDEN 0x9e3779b97f4a7c15ULL

static inline uint64_t mix(uint64_t z)
{
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
	return z ^ (z >> 31);
}

static void set_key(struct conn *c)
{
	uint64_t a = mix(opt.seed + GOLDEN);
	uint64_t b = mix(a + GOLDEN * (c->number + 1));

	c->k = mix(b + GOLDEN * (c->transaction + 1));
	c->l = mix(c->k ^ a);
}

/* Bytes offset .. offset + length - 1 of the message, at most SEND_CHUNK of them. */
static const unsigned char *payload(const struct conn *c, uint32_t offset, uint32_t length)
{
	uint64_t first = offset / 8, last = ((uint64_t)offset + length + 7) / 8;

	for (uint64_t i = first; i < last; i++)
		expected_words[i - first] = htole64(mix(c->k + GOLDEN * (i + 1)) ^ c->l);
	return (const unsigned char *)expected_words + offset % 8;
}

/* ---- Latency files ----------------------------------------------------------------------- */

static void samples_open(struct samples *s, const char *path)
{
	s->path = path;
	if (!path)
		return;
	s->file = fopen(path, "wbe");
	if (!s->file)
		die(OTHER, "cannot write %s: %s", path, strerror(errno));
	setvbuf(s->file, NULL, _IOFBF, 1 << 16);
}

static void samples_add(struct samples *s, uint64_t ns, uint64_t *in_phase)
{
	uint64_t raw = htole64(ns);

	if (!s->file)
		return;
	if (fwrite(&raw, sizeof(raw), 1, s->file) != 1)
		die(OTHER, "cannot write %s: %s", s->path, strerror(errno));
	s->total++;
	++*in_phase;
}

static void samples_flush(struct samples *s)
{
	if (s->file && fflush(s->file))
		die(OTHER, "cannot write %s: %s", s->path, strerror(errno));
}

/* ---- What the network namespace counts --------------------------------------------------- */

static void read_snmp(const char *path, struct network *n)
{
	char *names = NULL, *values = NULL;
	size_t a = 0, b = 0;
	FILE *f = fopen(path, "re");

	if (!f)
		die(OTHER, "cannot read %s: %s", path, strerror(errno));
	while (getline(&names, &a, f) > 0 && getline(&values, &b, f) > 0) {
		char *rest_n, *rest_v;
		char *group = strtok_r(names, " \n", &rest_n);
		char *same = strtok_r(values, " \n", &rest_v);

		while (group && same) {
			char *name = strtok_r(NULL, " \n", &rest_n);
			char *value = strtok_r(NULL, " \n", &rest_v);

			if (!name || !value)
				break;
			for (size_t i = 0; i < COUNTERS; i++)
				if (!strcmp(group, counters[i].group) &&
				    !strcmp(name, counters[i].name))
					n->snmp[i] = strtoull(value, NULL, 10);
		}
	}
	free(names);
	free(values);
	fclose(f);
}

static void read_network(struct network *n)
{
	const char *path = "/proc/self/net/dev";
	char *line = NULL;
	size_t size = 0;
	FILE *f;

	memset(n, 0, sizeof(*n));
	read_snmp("/proc/self/net/snmp", n);
	read_snmp("/proc/self/net/netstat", n);
	f = fopen(path, "re");
	if (!f)
		die(OTHER, "cannot read %s: %s", path, strerror(errno));
	while (getline(&line, &size, f) > 0 && n->n_ifaces < MAX_IFACES) {
		char *colon = strchr(line, ':'), *rest, *word;
		char *name = line + strspn(line, " ");
		int column = 0;

		if (!colon)
			continue;
		*colon = '\0';
		snprintf(n->ifaces[n->n_ifaces].name, sizeof(n->ifaces[0].name), "%s", name);
		for (word = strtok_r(colon + 1, " \n", &rest); word;
		     word = strtok_r(NULL, " \n", &rest), column++)
			for (size_t i = 0; i < COLUMNS; i++)
				if (columns[i].column == column)
					n->ifaces[n->n_ifaces].value[i] = strtoull(word, NULL, 10);
		n->n_ifaces++;
	}
	free(line);
	fclose(f);
}

/* ---- Errors ------------------------------------------------------------------------------ */

static int add_detail(enum kind kind, const struct conn *c, uint64_t transaction, uint64_t offset,
		      int expected, int got, uint64_t number)
{
	int index = -1;

	phase->errors[kind]++;
	if (phase->n_details < DETAILS) {
		index = phase->n_details++;
		phase->details[index] = (struct detail){
			.kind = kind, .stage = NO_STAGE, .connection = c->number,
			.transaction = transaction, .offset = offset,
			.expected = expected, .got = got, .count = number,
		};
	}
	if (++total_errors == opt.stop_on_error)
		stop("errors", BAD);
	return index;
}

static void drop(struct conn *c);

static void connection_failed(struct conn *c, enum stage stage, int error)
{
	int index = add_detail(CONNECTION, c, c->transaction, c->state == BUSY ? c->got : 0, -1,
			       -1, 1);
	int i;

	if (index >= 0) {
		phase->details[index].stage = stage;
		phase->details[index].error = error;
	}
	for (i = 0; i < phase->n_failures; i++)
		if (phase->failures[i].stage == stage && phase->failures[i].error == error)
			break;
	if (i < MAX_STAGE_ERRNOS) {
		phase->failures[i].stage = stage;
		phase->failures[i].error = error;
		phase->failures[i].count++;
		if (i == phase->n_failures)
			phase->n_failures++;
	}
	if (stage == CONNECT)
		retry_at = now + RETRY_NS;
	drop(c);
}

/* ---- Connections ------------------------------------------------------------------------- */

static unsigned int *counter_of(enum state state)
{
	switch (state) {
	case CONNECTING:
		return &count.connecting;
	case IDLE:
		return &count.idle;
	case PAUSED:
		return &count.paused;
	case BUSY:
		return &count.busy;
	case CLOSING:
		return &count.closing;
	case FREE:
		break;
	}
	return NULL;
}

static bool is_established(enum state state)
{
	return state == IDLE || state == PAUSED || state == BUSY;
}

static void set_state(struct conn *c, enum state state)
{
	unsigned int *from = counter_of(c->state), *to = counter_of(state);
	uint32_t slot = (uint32_t)(c - conns);

	if (c->state == PAUSED) {
		*(c->prev == NO_LIST ? &paused_head : &conns[c->prev].next) = c->next;
		*(c->next == NO_LIST ? &paused_tail : &conns[c->next].prev) = c->prev;
	}
	if (state == PAUSED) {	/* the pause is the same for all, so the list is in order */
		c->prev = paused_tail;
		c->next = NO_LIST;
		*(paused_tail == NO_LIST ? &paused_head : &conns[paused_tail].next) = slot;
		paused_tail = slot;
	}
	if (from)
		--*from;
	if (to)
		++*to;
	if (is_established(c->state) && !is_established(state))
		count.established--;
	if (!is_established(c->state) && is_established(state))
		count.established++;
	if (count.established > phase->established_max)
		phase->established_max = count.established;
	if (count.established > established_max)
		established_max = count.established;
	c->state = state;
	c->moved = progress = now;
}

static void not_fresh(struct conn *c)
{
	if (c->fresh)
		count.fresh--;
	c->fresh = false;
}

static void account_retransmissions(struct conn *c)
{
	struct tcp_info info;
	socklen_t length = sizeof(info);

	memset(&info, 0, sizeof(info));
	if (getsockopt(c->fd, IPPROTO_TCP, TCP_INFO, &info, &length))
		return;
	phase->retrans += info.tcpi_total_retrans - c->retrans;
	c->retrans = info.tcpi_total_retrans;
}

static void release(struct conn *c)
{
	account_retransmissions(c);
	close(c->fd);
	c->fd = -1;
	c->generation = (c->generation + 1) & 0x7fffffff;
	not_fresh(c);
	set_state(c, FREE);
	count.open--;
	phase->closed++;
	phase->last = now;
	free_slots[n_free++] = (uint32_t)(c - conns);
}

static void reset(struct conn *c)
{
	struct linger linger = { .l_onoff = 1, .l_linger = 0 };

	setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
	release(c);
}

/* Gives a connection up after an error; what it still owed has failed. */
static void drop(struct conn *c)
{
	if (opt.per_connection)
		phase->failed += opt.per_connection - c->transaction;
	else if (c->state == BUSY)
		phase->failed++;
	reset(c);
}

static void begin_close(struct conn *c)
{
	if (opt.close == RST) {
		reset(c);
		return;
	}
	if (shutdown(c->fd, SHUT_WR)) {
		connection_failed(c, CLOSE, errno);
		return;
	}
	set_state(c, CLOSING);
}

static void close_where(bool (*wanted)(const struct conn *))
{
	unsigned int closed = 0;
	struct timespec pause = { .tv_nsec = CLOSE_PAUSE_NS };

	for (uint32_t i = 0; i < opt.connections; i++) {
		if (!wanted(&conns[i]))
			continue;
		if (closed++ % opt.burst == opt.burst - 1)
			nanosleep(&pause, NULL);
		begin_close(&conns[i]);
	}
}

static void send_more(struct conn *c)
{
	while (c->sent < opt.size) {
		uint32_t length = (uint32_t)opt.size - c->sent;
		ssize_t n;

		if (length > SEND_CHUNK)
			length = SEND_CHUNK;
		n = send(c->fd, payload(c, c->sent, length), length, MSG_NOSIGNAL);
		if (n < 0) {
			if (errno == EINTR)
				continue;
			if (errno != EAGAIN)
				connection_failed(c, TRANSFER, errno);
			return;
		}
		c->sent += (uint32_t)n;
		phase->sent += (uint64_t)n;
		c->moved = progress = now;
	}
}

static void start_transaction(struct conn *c)
{
	set_state(c, BUSY);
	phase->started++;
	if (c->phase != n_phases) {
		c->phase = n_phases;
		phase->first_timers++;
		if (!opt.per_connection && opt.mode == CLOSED) {
			c->fresh = true;
			count.fresh++;
		}
	}
	c->sent = c->got = 0;
	c->detail = -1;
	set_key(c);
	c->since = read_clock();
	send_more(c);
}

static bool time_is_up(void)
{
	return phase->deadline && now >= phase->deadline;
}

/* n = 0: may this phase begin another transaction? */
static bool budget_left(void)
{
	if (!running || time_is_up())
		return false;
	return phase->deadline || phase->started < phase->asked;
}

/* n > 0: how many connections this phase still has to open */
static uint64_t to_open(void)
{
	if (!running || time_is_up())
		return 0;
	if (phase->deadline)
		return UINT64_MAX;
	return phase->asked / opt.per_connection - phase->opened;
}

/* Closed loop: begin the next transaction of an idle connection if there is one for it. */
static void next_transaction(struct conn *c)
{
	if (!opt.per_connection) {
		uint64_t waiting = opt.connections > phase->first_timers ?
				   opt.connections - phase->first_timers : 0;

		if (!budget_left())
			return;
		if (!phase->deadline && c->phase == n_phases &&
		    phase->asked - phase->started <= waiting)
			return;
	}
	start_transaction(c);
}

static void complete(struct conn *c)
{
	uint64_t at = read_clock();

	phase->completed++;
	phase->last = now = at;
	if (!warming_up)
		samples_add(&latency, at - c->since, &phase->latency_count);
	c->transaction++;
	set_state(c, IDLE);
}

/* After a complete reply, when it is certain that no extra byte came with it. */
static void after_reply(struct conn *c)
{
	if (opt.mode == ROUNDS)
		return;
	if (opt.per_connection && c->transaction == opt.per_connection) {
		begin_close(c);
	} else if (opt.pause_us) {
		c->due = now + opt.pause_us * 1000;
		set_state(c, PAUSED);
	} else {
		next_transaction(c);
	}
}

static void verify(struct conn *c, const unsigned char *bytes, uint32_t length)
{
	while (length) {
		uint32_t part = length < SEND_CHUNK ? length : SEND_CHUNK;
		const unsigned char *expected = payload(c, c->got, part);

		if (memcmp(expected, bytes, part)) {
			for (uint32_t i = 0; i < part; i++) {
				if (expected[i] == bytes[i])
					continue;
				phase->wrong_bytes++;
				if (c->detail == -1) {
					c->detail = add_detail(WRONG, c, c->transaction,
							       c->got + i, expected[i],
							       bytes[i], 1);
					if (c->detail < 0)
						c->detail = -2;
				} else if (c->detail >= 0) {
					phase->details[c->detail].count++;
				}
			}
		}
		c->got += part;
		bytes += part;
		length -= part;
	}
}

/* Takes what was read. False: the connection is gone or begins something new. */
static bool take(struct conn *c, const unsigned char *bytes, uint32_t length)
{
	uint32_t due, extra;

	phase->received += length;
	c->moved = progress = now;
	if (c->state == CLOSING) {
		add_detail(EXTRA, c, c->transaction ? c->transaction - 1 : 0, opt.size, -1,
			   bytes[0], length);
		drop(c);
		return false;
	}
	if (c->state != BUSY) {
		if (c->transaction)
			add_detail(EXTRA, c, c->transaction - 1, opt.size, -1, bytes[0], length);
		else
			add_detail(EARLY, c, 0, 0, -1, bytes[0], length);
		drop(c);
		return false;
	}
	not_fresh(c);
	due = c->sent - c->got;
	if (due > length)
		due = length;
	extra = length - due;
	verify(c, bytes, due);
	if (c->got == opt.size) {
		complete(c);
		if (!extra)
			return true;
		add_detail(EXTRA, c, c->transaction - 1, opt.size, -1, bytes[due], extra);
		drop(c);
		return false;
	}
	if (extra) {
		add_detail(EARLY, c, c->transaction, c->got, -1, bytes[due], extra);
		drop(c);
		return false;
	}
	return true;
}

static void readable(struct conn *c, bool to_the_end)
{
	uint32_t generation = c->generation;

	while (c->generation == generation) {
		size_t due = c->state == BUSY ? opt.size - c->got : 0;
		ssize_t n = recv(c->fd, buffer, due + SLACK, 0);
		uint64_t before = c->transaction;

		if (n < 0) {
			if (errno == EINTR)
				continue;
			if (errno != EAGAIN)
				connection_failed(c, c->state == CLOSING ? CLOSE : TRANSFER,
						  errno);
			return;
		}
		if (n == 0) {
			if (c->state == CLOSING) {
				release(c);
				return;
			}
			add_detail(MISSING, c, c->transaction, c->state == BUSY ? c->got : 0,
				   -1, -1, 1);
			drop(c);
			return;
		}
		if ((size_t)n < due)
			phase->partial_reads++;
		if (!take(c, buffer, (uint32_t)n))
			return;
		if (c->transaction != before)
			after_reply(c);
		/*
		 * Edge triggered: a short read has emptied the socket, and whatever comes
		 * later makes an event of its own. Not so an end that is there already.
		 */
		if ((size_t)n < due + SLACK && !to_the_end)
			return;
	}
}

static void connected(struct conn *c)
{
	uint64_t at = read_clock();

	now = at;
	samples_add(&connect_latency, at - c->since, &phase->connect_count);
	set_state(c, IDLE);
	if (opt.mode == CLOSED)
		next_transaction(c);
}

static void on_connection(struct conn *c, uint32_t events)
{
	uint32_t generation = c->generation;

	event_count++;
	if (c->state == CONNECTING) {
		int error = 0;
		socklen_t length = sizeof(error);

		if (events & (EPOLLERR | EPOLLHUP)) {
			getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &length);
			connection_failed(c, CONNECT, error ? error : ECONNRESET);
			return;
		}
		if (!(events & EPOLLOUT))
			return;
		connected(c);
	} else if (c->state == BUSY && c->sent < opt.size && (events & EPOLLOUT)) {
		send_more(c);
	}
	if (c->generation == generation &&
	    (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)))
		readable(c, events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR));
}

/* False: this machine cannot open one now. */
static void open_one(void)
{
	struct conn *c = &conns[free_slots[--n_free]];
	const int one = 1;
	struct epoll_event event = {
		.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
		.data.u64 = (uint64_t)c->generation << 32 | (uint32_t)(c - conns),
	};

	c->number = next_number++;
	c->transaction = 0;
	c->sent = c->got = c->retrans = 0;
	c->phase = 0;
	c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (c->fd < 0)
		die(OTHER, "cannot open a socket: %s", strerror(errno));
	setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	count.open++;
	phase->opened++;
	if (group_left)
		group_left--;
	set_state(c, CONNECTING);
	c->since = read_clock();
	if (opt.n_sources) {
		struct sockaddr_in *from = &opt.sources[c->number % opt.n_sources];

		if (from->sin_port) {
			/* One connection at a time has it, and the next has it at once. */
			from = &opt.sources[(c - conns) % opt.n_sources];
			setsockopt(c->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
		} else {
			/* The port is chosen at connect, where it need only differ per destination. */
			setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one));
		}
		if (bind(c->fd, (struct sockaddr *)from, sizeof(*from))) {
			connection_failed(c, CONNECT, errno);
			return;
		}
	}
	if (connect(c->fd, (struct sockaddr *)&opt.to, sizeof(opt.to)) && errno != EINPROGRESS) {
		connection_failed(c, CONNECT, errno);
		return;
	}
	if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event))
		die(OTHER, "cannot watch a socket: %s", strerror(errno));
}

/* ---- What to do next --------------------------------------------------------------------- */

static bool want_open(void)
{
	if (!running || count.open >= opt.connections)
		return false;
	if (!opt.per_connection)
		return warming_up || budget_left();
	return opt.mode == ROUNDS ? group_left > 0 : to_open() > 0;
}

static void open_more(void)
{
	/*
	 * A connection counts as in flight until it is established, and in an unlimited closed
	 * run until its first reply shows that the server has accepted it: an established one
	 * still occupies the backlog.
	 */
	while (count.connecting + count.fresh < opt.burst && now >= retry_at && want_open()) {
		if (opt.ramp && phase->opened < opt.connections) {
			if (now < ramp_at)
				return;
			ramp_at = (ramp_at ? ramp_at : now) + NSEC / opt.ramp;
		}
		open_one();
	}
}

static bool is_idle(const struct conn *c)
{
	return c->state == IDLE;
}

static bool is_finished(const struct conn *c)
{
	return c->state == IDLE && c->transaction == opt.per_connection;
}

static void step_rounds(void)
{
	unsigned int finished = 0;

	if (count.busy || count.connecting || count.closing)
		return;
	if (opt.per_connection) {
		for (uint32_t i = 0; i < opt.connections; i++)
			finished += is_finished(&conns[i]);
		if (finished)
			close_where(is_finished);
		if (count.closing)
			return;
		if (!count.open) {
			group_left = to_open();
			if (group_left > opt.connections)
				group_left = opt.connections;
		}
		if (group_left || !count.idle)
			return;
	} else if (!budget_left() || count.open < opt.connections) {
		return;
	}
	phase->rounds++;
	for (uint32_t i = 0; i < opt.connections; i++)
		if (conns[i].state == IDLE && (opt.per_connection || budget_left()))
			start_transaction(&conns[i]);
}

/* Unlimited closed loop: set idle connections going, no more than a burst at a time. */
static void kick(void)
{
	if (!count.busy && !count.paused && !count.connecting && count.idle && budget_left())
		kick_slot = 0;
	for (; kick_slot < opt.connections && count.fresh < opt.burst; kick_slot++)
		if (conns[kick_slot].state == IDLE)
			next_transaction(&conns[kick_slot]);
}

static void schedule(void)
{
	while (paused_head != NO_LIST && conns[paused_head].due <= now) {
		struct conn *c = &conns[paused_head];

		set_state(c, IDLE);
		next_transaction(c);
	}
	if (opt.mode == ROUNDS)
		step_rounds();
	else if (!opt.per_connection)
		kick();
	open_more();
}

static bool phase_over(void)
{
	if (count.connecting || count.busy || count.paused || count.closing)
		return false;
	if (opt.per_connection)
		return !count.open && !to_open() && !group_left;
	return !budget_left() && (!warming_up || count.open == opt.connections);
}

/* ---- Waiting ----------------------------------------------------------------------------- */

static void read_commands(void)
{
	ssize_t n;

	if (n_commands == sizeof(commands) - 1)
		die(USAGE, "a command line on stdin is too long");
	n = read(STDIN_FILENO, commands + n_commands, sizeof(commands) - 1 - n_commands);
	if (n > 0) {
		n_commands += (size_t)n;
		commands[n_commands] = '\0';
		return;
	}
	if (n < 0 && (errno == EINTR || errno == EAGAIN))
		return;
	input_ended = true;
	epoll_ctl(epoll_fd, EPOLL_CTL_DEL, STDIN_FILENO, NULL);
}

static void arm_timer(void)
{
	uint64_t due = UINT64_MAX;
	struct itimerspec at = { 0 };

	if (paused_head != NO_LIST)
		due = conns[paused_head].due;
	if (want_open()) {
		if (retry_at > now && retry_at < due)
			due = retry_at;
		if (opt.ramp && phase->opened < opt.connections && ramp_at > now && ramp_at < due)
			due = ramp_at;
	}
	if (due == UINT64_MAX || due == timer_armed)
		return;
	timer_armed = due;
	at.it_value.tv_sec = (time_t)(due / NSEC);
	at.it_value.tv_nsec = (long)(due % NSEC);
	timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &at, NULL);
}

/* Waits until something happens, at most until `until` (ns, 0: for ever), and deals with it. */
static void wait_events(uint64_t until)
{
	static struct epoll_event events[EVENTS];
	int timeout = -1, n;

	if (until) {
		uint64_t left = until > now ? (until - now + MSEC - 1) / MSEC : 0;

		timeout = left > 3600000 ? 3600000 : (int)left;
	}
	arm_timer();
	n = epoll_wait(epoll_fd, events, EVENTS, timeout);
	if (n < 0 && errno != EINTR)
		die(OTHER, "cannot wait for events: %s", strerror(errno));
	now = read_clock();
	for (int i = 0; i < n; i++) {
		uint64_t what = events[i].data.u64;
		uint64_t expirations;

		if (what == (SPECIAL | ON_STDIN)) {
			read_commands();
		} else if (what == (SPECIAL | ON_SIGNAL)) {
			say("interrupted");
			stop("interrupted", OTHER);
		} else if (what == (SPECIAL | ON_TIMER)) {
			timer_armed = 0;
			if (read(timer_fd, &expirations, sizeof(expirations)) < 0)
				continue;
		} else {
			struct conn *c = &conns[(uint32_t)what];

			if (c->state != FREE && c->generation == what >> 32)
				on_connection(c, events[i].events);
		}
	}
	if (input_ended && !finishing && !memchr(commands, '\n', n_commands) && !stopped()) {
		say("the controller has gone: stdin ended without `finish`");
		stop("interrupted", OTHER);
	}
}

/* ---- Phases ------------------------------------------------------------------------------ */

/* From here on errors and traffic belong to a new phase. */
static void new_phase(void)
{
	phases = realloc(phases, (n_phases + 1) * sizeof(*phases));
	if (!phases)
		die(OTHER, "out of memory");
	phase = &phases[n_phases++];
	memset(phase, 0, sizeof(*phase));
	phase->latency_first = latency.total;
	phase->connect_first = connect_latency.total;
	phase->established_max = count.established;
	for (uint32_t i = 0; i < opt.connections; i++)
		conns[i].detail = -1;
}

static void read_cpu(uint64_t *user, uint64_t *system)
{
	struct rusage use;

	getrusage(RUSAGE_SELF, &use);
	*user = (uint64_t)use.ru_utime.tv_sec * 1000000 + (uint64_t)use.ru_utime.tv_usec;
	*system = (uint64_t)use.ru_stime.tv_sec * 1000000 + (uint64_t)use.ru_stime.tv_usec;
}

static void begin_phase(uint64_t asked, double seconds)
{
	read_network(&phase->before);
	read_cpu(&phase->user_us, &phase->system_us);
	now = progress = phase->begin = phase->last = read_clock();
	phase->asked = asked;
	if (seconds > 0)
		phase->deadline = now + (uint64_t)(seconds * NSEC);
	group_left = 0;
	ramp_at = 0;
	kick_slot = 0;
	running = true;
}

static void end_phase(void)
{
	uint64_t user, system;

	running = false;
	if (phase->deadline)
		phase->asked = phase->completed + phase->failed;
	for (uint32_t i = 0; i < opt.connections; i++)
		if (conns[i].state != FREE)
			account_retransmissions(&conns[i]);
	read_cpu(&user, &system);
	phase->user_us = user - phase->user_us;
	phase->system_us = system - phase->system_us;
	read_network(&phase->after);
	samples_flush(&latency);
	samples_flush(&connect_latency);
	phase->complete = !stopped();
}

static uint64_t stall_ns(void)
{
	return (uint64_t)(opt.stall * NSEC);
}

static void run_until_drained(void)
{
	uint64_t quiet_until = 0, seen = 0;

	for (;;) {
		uint64_t until;

		if (stopped())
			return;
		schedule();
		until = progress + stall_ns();
		if (stopped())
			return;
		if (phase_over()) {
			if (!quiet_until || seen != event_count) {
				seen = event_count;
				quiet_until = now + opt.quiet_ms * MSEC;
			}
			if (now >= quiet_until)
				return;
			until = quiet_until;
		} else {
			quiet_until = 0;
			if (!count.paused && now >= until) {
				stop("stalled", STALLED);
				return;
			}
			if (count.paused)
				until = 0;
			if (phase->deadline && phase->deadline > now &&
			    (!until || phase->deadline < until))
				until = phase->deadline;
		}
		wait_events(until);
	}
}

static void run_phase(uint64_t asked, double seconds)
{
	begin_phase(asked, seconds);
	run_until_drained();
	end_phase();
}

static void close_all(void)
{
	begin_phase(0, 0);
	running = false;
	close_where(is_idle);
	run_until_drained();
	end_phase();
}

/* ---- Reports ----------------------------------------------------------------------------- */

static void put_string(FILE *f, const char *s)
{
	fputc('"', f);
	for (; *s; s++) {
		if (*s == '"' || *s == '\\')
			fprintf(f, "\\%c", *s);
		else if ((unsigned char)*s < 0x20)
			fprintf(f, "\\u%04x", *s);
		else
			fputc(*s, f);
	}
	fputc('"', f);
}

static void put_byte(FILE *f, const char *name, int value)
{
	if (value < 0)
		fprintf(f, ", \"%s\": null", name);
	else
		fprintf(f, ", \"%s\": %d", name, value);
}

static const char *errno_name(int error)
{
	const char *name = strerrorname_np(error);

	return name ? name : "unknown";
}

static void put_errors(FILE *f, const struct phase *p)
{
	fputs("\"errors\": {", f);
	for (int i = 0; i < KINDS; i++)
		fprintf(f, "%s\"%s\": %" PRIu64, i ? ", " : "", kind_names[i], p->errors[i]);
	fprintf(f, "}, \"wrong_bytes\": %" PRIu64 ", \"connection_errors\": [", p->wrong_bytes);
	for (int i = 0; i < p->n_failures; i++)
		fprintf(f, "%s{\"stage\": \"%s\", \"errno\": \"%s\", \"count\": %" PRIu64 "}",
			i ? ", " : "", stage_names[p->failures[i].stage],
			errno_name(p->failures[i].error), p->failures[i].count);
	fputs("], \"details\": [", f);
	for (int i = 0; i < p->n_details; i++) {
		const struct detail *d = &p->details[i];

		fprintf(f, "%s{\"kind\": \"%s\", \"connection\": %" PRIu64, i ? ", " : "",
			kind_names[d->kind], d->connection);
		fprintf(f, ", \"transaction\": %" PRIu64 ", \"offset\": %" PRIu64,
			d->transaction, d->offset);
		put_byte(f, "expected", d->expected);
		put_byte(f, "got", d->got);
		fprintf(f, ", \"count\": %" PRIu64 ", \"stage\": \"%s\", \"errno\": \"%s\"}",
			d->count, stage_names[d->stage], d->error ? errno_name(d->error) : "");
	}
	fputs("], ", f);
}

/* Both snapshots list the same interfaces unless one came or went, which then counts from 0. */
static void put_network(FILE *f, const struct network *a, const struct network *b)
{
	fputs("\"counters\": {", f);
	for (size_t i = 0; i < COUNTERS; i++)
		fprintf(f, "%s\"%s\": %" PRIu64, i ? ", " : "", counters[i].name,
			b->snmp[i] - a->snmp[i]);
	fputs("}, \"interfaces\": {", f);
	for (unsigned int i = 0; i < b->n_ifaces; i++) {
		unsigned int j = 0;

		while (j < a->n_ifaces && strcmp(a->ifaces[j].name, b->ifaces[i].name))
			j++;
		fputs(i ? ", " : "", f);
		put_string(f, b->ifaces[i].name);
		fputs(": {", f);
		for (size_t k = 0; k < COLUMNS; k++)
			fprintf(f, "%s\"%s\": %" PRIu64, k ? ", " : "", columns[k].name,
				b->ifaces[i].value[k] -
				(j < a->n_ifaces ? a->ifaces[j].value[k] : 0));
		fputc('}', f);
	}
	fputs("}", f);
}

static void put_phase(FILE *f, const struct phase *p)
{
	fprintf(f, "{\"complete\": %s", p->complete ? "true" : "false");
#define PUT(name, value) fprintf(f, ", \"" name "\": %" PRIu64, (uint64_t)(value))
	PUT("asked", p->asked);
	PUT("transactions", p->completed);
	PUT("failed", p->failed);
	PUT("connections_opened", p->opened);
	PUT("connections_closed", p->closed);
	PUT("max_established", p->established_max);
	PUT("rounds", p->rounds);
	PUT("bytes_sent", p->sent);
	PUT("bytes_received", p->received);
	PUT("partial_reads", p->partial_reads);
	PUT("retransmissions", p->retrans);
	PUT("wall_ns", p->last - p->begin);
	PUT("cpu_user_us", p->user_us);
	PUT("cpu_system_us", p->system_us);
	PUT("latency_first", p->latency_first);
	PUT("latency_count", p->latency_count);
	PUT("connect_latency_first", p->connect_first);
	PUT("connect_latency_count", p->connect_count);
#undef PUT
	fputs(", ", f);
	put_errors(f, p);
	put_network(f, &p->before, &p->after);
	fputc('}', f);
}

static void put_config(FILE *f)
{
	fputs("{\"address\": ", f);
	put_string(f, opt.address);
	fprintf(f, ", \"port\": %u, \"connections\": %u, \"ramp\": %" PRIu64 ", \"burst\": %u",
		opt.port, opt.connections, opt.ramp, opt.burst);
	fprintf(f, ", \"transactions_per_connection\": %" PRIu64 ", \"size\": %" PRIu64,
		opt.per_connection, opt.size);
	fprintf(f, ", \"warm_up\": %" PRIu64 ", \"mode\": \"%s\", \"close\": \"%s\"", opt.warm_up,
		opt.mode == CLOSED ? "closed" : "rounds", opt.close == RST ? "rst" : "fin");
	fprintf(f, ", \"seed\": %" PRIu64 ", \"stall_seconds\": %g", opt.seed, opt.stall);
	fprintf(f, ", \"pause_us\": %" PRIu64 ", \"quiet_ms\": %" PRIu64, opt.pause_us,
		opt.quiet_ms);
	fprintf(f, ", \"stop_on_error\": %" PRIu64 ", \"sources\": [", opt.stop_on_error);
	for (unsigned int i = 0; i < opt.n_sources; i++) {
		char text[INET_ADDRSTRLEN];

		inet_ntop(AF_INET, &opt.sources[i].sin_addr, text, sizeof(text));
		fprintf(f, "%s\"%s", i ? ", " : "", text);
		if (opt.sources[i].sin_port)
			fprintf(f, ":%u", ntohs(opt.sources[i].sin_port));
		fputc('"', f);
	}
	fputs("]}", f);
}

static bool is_stuck(const struct conn *c)
{
	return c->state == CONNECTING || c->state == BUSY || c->state == CLOSING;
}

static void put_stuck(FILE *f)
{
	unsigned int stuck = 0;

	fputs("\"stuck\": [", f);
	for (uint32_t i = 0; !strcmp(outcome, "stalled") && i < opt.connections; i++) {
		struct conn *c = &conns[i];

		if (!is_stuck(c) || stuck++ >= DETAILS)
			continue;
		fprintf(f, "%s{\"connection\": %" PRIu64 ", \"transaction\": %" PRIu64,
			stuck > 1 ? ", " : "", c->number, c->transaction);
		fprintf(f, ", \"state\": \"%s\", \"sent\": %u, \"received\": %u, \"idle_ms\": %" PRIu64
			"}", state_names[c->state], c->sent, c->got, (now - c->moved) / MSEC);
	}
	fprintf(f, "], \"stuck_connections\": %u", stuck);
}

static void put_result(FILE *f)
{
	fprintf(f, "{\"version\": %d, \"outcome\": \"%s\", \"config\": ", FORMAT_VERSION, outcome);
	put_config(f);
	fprintf(f, ", \"max_established\": %u, ", established_max);
	put_stuck(f);
	fputs(", \"phases\": [", f);
	for (unsigned int i = 0; i < n_phases; i++) {
		if (i)
			fputs(", ", f);
		put_phase(f, &phases[i]);
	}
	fputs("]}", f);
}

static void end_line(void)
{
	if (fputc('\n', stdout) == EOF || fflush(stdout))
		die(OTHER, "cannot write to stdout: %s", strerror(errno));
}

/* ---- Options ----------------------------------------------------------------------------- */

static const char help[] =
	"usage: loadgen --address ADDRESS --port PORT [option]...\n"
	"Drives a TCP echo server and checks every byte of every reply.\n"
	"\n"
	"The server\n"
	"  --address ADDRESS     IPv4 address\n"
	"  --port PORT           1 to 65535\n"
	"  --source LIST         own addresses to use in turn, comma-separated (needed when more\n"
	"                        connections than one address has ports); or ADDRESS:PORT each,\n"
	"                        as many as connections: each connection slot then has its own\n"
	"\n"
	"The load\n"
	"  --connections C       simultaneous connections, 1 to 200000 (default 1)\n"
	"  --transactions-per-connection N\n"
	"                        then the connection is closed and replaced (default 1; 0: never)\n"
	"  --size S              bytes of a message, 1 to 65536 (default 64)\n"
	"  --mode closed|rounds  closed: each connection goes on when its reply is in (default);\n"
	"                        rounds: all send one, the next round when all replies are in\n"
	"  --pause US            microseconds between a reply and the next request, closed mode\n"
	"                        (default 0)\n"
	"  --close rst|fin       how a connection is closed: RST (default), or FIN and waiting for\n"
	"                        the server's FIN\n"
	"  --burst K             at most K connections in flight (in an unlimited closed run: until\n"
	"                        their first reply) when opening; the default, 128, overflows\n"
	"                        neither a tap queue of 500 packets nor a usual backlog\n"
	"  --ramp R              open the first C connections of a phase at R a second (default 0:\n"
	"                        as fast as --burst lets)\n"
	"  --seed SEED           of the payload, 0 to 2^64-1 (default: random; it is in the result)\n"
	"\n"
	"Phases\n"
	"  --warm-up T           transactions before the measured phase, rounded up to whole\n"
	"                        connections (default: as many as C connections do, C if they are\n"
	"                        unlimited; 0 then only opens them)\n"
	"  --transactions N      measured transactions; a multiple of N above if that is not 0\n"
	"  --seconds SECONDS     measure that long instead\n"
	"  --control             wait for `go [N]` and `finish` on stdin, say `ready`, `done JSON`\n"
	"                        and `result JSON` on stdout\n"
	"  --quiet MS            a phase has drained when nothing has come for so long (default 50,\n"
	"                        longer than a delayed acknowledgement)\n"
	"  --stall SECONDS       give up when nothing at all has moved for so long (default 30)\n"
	"  --stop-on-error E     give up after E errors (default 100; 0: never)\n"
	"\n"
	"Output: JSON on stdout, and\n"
	"  --latency-file FILE          transactions, raw little-endian 64-bit nanoseconds\n"
	"  --connect-latency-file FILE  likewise for connections\n"
	"  --help                       this text\n"
	"\n"
	"Exit status: 0 all right; 2 usage; 3 wrong bytes or failed connections; 4 stalled;\n"
	"5 anything else (interrupted, out of memory, too few descriptors, unwritable file).\n";

static uint64_t number(const char *option, const char *text, uint64_t least, uint64_t most)
{
	char *end;
	uint64_t value;

	errno = 0;
	value = strtoull(text, &end, 0);
	if (errno || end == text || *end || strchr(text, '-') || value < least || value > most)
		die(USAGE, "--%s: `%s' is not a whole number from %" PRIu64 " to %" PRIu64, option,
		    text, least, most);
	return value;
}

static double duration(const char *option, const char *text)
{
	char *end;
	double value;

	errno = 0;
	value = strtod(text, &end);
	if (errno || end == text || *end || !(value > 0 && value <= 86400))
		die(USAGE, "--%s: `%s' is not a number of seconds above 0, at most 86400", option,
		    text);
	return value;
}

static int choice(const char *option, const char *text, const char *first, const char *second)
{
	if (!strcmp(text, first))
		return 0;
	if (!strcmp(text, second))
		return 1;
	die(USAGE, "--%s: `%s' is neither `%s' nor `%s'", option, text, first, second);
}

static void parse_address(const char *option, const char *text, struct sockaddr_in *address)
{
	memset(address, 0, sizeof(*address));
	address->sin_family = AF_INET;
	if (inet_pton(AF_INET, text, &address->sin_addr) != 1)
		die(USAGE, "--%s: `%s' is not an IPv4 address such as 198.18.0.2", option, text);
}

static void parse_sources(const char *text)
{
	char *list = strdup(text), *rest = list, *word;

	if (!list)
		die(OTHER, "out of memory");
	while ((word = strsep(&rest, ","))) {
		struct sockaddr_in *source = &opt.sources[opt.n_sources];
		char *port = strchr(word, ':');

		if (opt.n_sources++ == MAX_SOURCES)
			die(USAGE, "--source: more than %d addresses", MAX_SOURCES);
		if (port)
			*port++ = '\0';
		parse_address("source", word, source);
		if (port)
			source->sin_port = htons(number("source", port, 1, 65535));
		if (!port != !opt.sources[0].sin_port)
			die(USAGE, "--source: give all of them a port, or none");
	}
	free(list);
}

enum option_id {
	O_ADDRESS = 1, O_PORT, O_CONNECTIONS, O_RAMP, O_BURST, O_PER_CONNECTION, O_SIZE, O_WARM_UP,
	O_TRANSACTIONS, O_SECONDS, O_MODE, O_CLOSE, O_SEED, O_STALL, O_PAUSE, O_QUIET, O_SOURCE,
	O_LATENCY, O_CONNECT_LATENCY, O_STOP, O_CONTROL, O_HELP,
};

static const struct option options[] = {
	{ "address", required_argument, NULL, O_ADDRESS },
	{ "port", required_argument, NULL, O_PORT },
	{ "connections", required_argument, NULL, O_CONNECTIONS },
	{ "ramp", required_argument, NULL, O_RAMP },
	{ "burst", required_argument, NULL, O_BURST },
	{ "transactions-per-connection", required_argument, NULL, O_PER_CONNECTION },
	{ "size", required_argument, NULL, O_SIZE },
	{ "warm-up", required_argument, NULL, O_WARM_UP },
	{ "transactions", required_argument, NULL, O_TRANSACTIONS },
	{ "seconds", required_argument, NULL, O_SECONDS },
	{ "mode", required_argument, NULL, O_MODE },
	{ "close", required_argument, NULL, O_CLOSE },
	{ "seed", required_argument, NULL, O_SEED },
	{ "stall", required_argument, NULL, O_STALL },
	{ "pause", required_argument, NULL, O_PAUSE },
	{ "quiet", required_argument, NULL, O_QUIET },
	{ "source", required_argument, NULL, O_SOURCE },
	{ "latency-file", required_argument, NULL, O_LATENCY },
	{ "connect-latency-file", required_argument, NULL, O_CONNECT_LATENCY },
	{ "stop-on-error", required_argument, NULL, O_STOP },
	{ "control", no_argument, NULL, O_CONTROL },
	{ "help", no_argument, NULL, O_HELP },
	{ 0 },
};

static void set_option(enum option_id id, const char *name)
{
	switch (id) {
	case O_ADDRESS:
		parse_address(name, optarg, &opt.to);
		opt.address = optarg;
		break;
	case O_PORT:
		opt.port = (unsigned int)number(name, optarg, 1, 65535);
		break;
	case O_CONNECTIONS:
		opt.connections = (unsigned int)number(name, optarg, 1, MAX_CONNS);
		break;
	case O_RAMP:
		opt.ramp = number(name, optarg, 0, 1000000);
		break;
	case O_BURST:
		opt.burst = (unsigned int)number(name, optarg, 1, MAX_CONNS);
		break;
	case O_PER_CONNECTION:
		opt.per_connection = number(name, optarg, 0, 1000000000);
		break;
	case O_SIZE:
		opt.size = number(name, optarg, 1, MAX_SIZE);
		break;
	case O_WARM_UP:
		opt.warm_up = number(name, optarg, 0, 1000000000000);
		opt.warm_up_given = true;
		break;
	case O_TRANSACTIONS:
		opt.transactions = number(name, optarg, 1, 1000000000000);
		break;
	case O_SECONDS:
		opt.seconds = duration(name, optarg);
		break;
	case O_MODE:
		opt.mode = choice(name, optarg, "closed", "rounds") ? ROUNDS : CLOSED;
		break;
	case O_CLOSE:
		opt.close = choice(name, optarg, "rst", "fin") ? FIN : RST;
		break;
	case O_SEED:
		opt.seed = number(name, optarg, 0, UINT64_MAX);
		break;
	case O_STALL:
		opt.stall = duration(name, optarg);
		break;
	case O_PAUSE:
		opt.pause_us = number(name, optarg, 0, 3600000000);
		break;
	case O_QUIET:
		opt.quiet_ms = number(name, optarg, 0, 60000);
		break;
	case O_SOURCE:
		parse_sources(optarg);
		break;
	case O_LATENCY:
		opt.latency_file = optarg;
		break;
	case O_CONNECT_LATENCY:
		opt.connect_latency_file = optarg;
		break;
	case O_STOP:
		opt.stop_on_error = number(name, optarg, 0, UINT64_MAX);
		break;
	case O_CONTROL:
		opt.control = true;
		break;
	case O_HELP:
		fputs(help, stdout);
		exit(fflush(stdout) ? OTHER : OK);
	}
}

/* A window has to be a whole number of connections. */
static void check_whole(const char *what, uint64_t n)
{
	if (opt.per_connection && n % opt.per_connection)
		die(USAGE, "%s: %" PRIu64 " transactions are not a whole number of connections of %"
		    PRIu64 " each", what, n, opt.per_connection);
}

static void parse_options(int argc, char **argv)
{
	int id, index = 0;

	if (getrandom(&opt.seed, sizeof(opt.seed), 0) != sizeof(opt.seed))
		die(OTHER, "cannot get a random seed: %s", strerror(errno));
	while ((id = getopt_long(argc, argv, "", options, &index)) != -1) {
		if (id == '?')
			die(USAGE, "see --help");
		set_option((enum option_id)id, options[index].name);
	}
	if (optind < argc)
		die(USAGE, "unexpected argument `%s'; see --help", argv[optind]);
	if (!opt.address)
		die(USAGE, "--address is missing: give the server's IPv4 address");
	if (!opt.port)
		die(USAGE, "--port is missing: give the server's port");
	if (opt.transactions && opt.seconds > 0)
		die(USAGE, "--transactions and --seconds exclude each other: give one");
	if (!opt.control && !opt.transactions && !(opt.seconds > 0))
		die(USAGE, "say how much to measure: --transactions, --seconds or --control");
	if (opt.pause_us && opt.mode == ROUNDS)
		die(USAGE, "--pause is for --mode closed: in rounds nobody waits");
	check_whole("--transactions", opt.transactions);
	if (!opt.warm_up_given)
		opt.warm_up = opt.connections * (opt.per_connection ? opt.per_connection : 1);
	if (opt.n_sources && opt.sources[0].sin_port && opt.connections > opt.n_sources)
		die(USAGE, "--source: %u connections cannot share %u ports", opt.connections,
		    opt.n_sources);
	if (opt.per_connection && opt.warm_up % opt.per_connection)
		opt.warm_up += opt.per_connection - opt.warm_up % opt.per_connection;
	opt.to.sin_port = htons((uint16_t)opt.port);
}

/* ---- The run ----------------------------------------------------------------------------- */

static void raise_descriptor_limit(void)
{
	struct rlimit limit;
	rlim_t need = (rlim_t)opt.connections + SPARE_FDS;

	getrlimit(RLIMIT_NOFILE, &limit);
	if (limit.rlim_cur >= need)
		return;
	limit.rlim_cur = need;
	if (limit.rlim_max < need)
		limit.rlim_max = need;	/* only root may */
	if (setrlimit(RLIMIT_NOFILE, &limit)) {
		getrlimit(RLIMIT_NOFILE, &limit);
		die(OTHER, "%u connections need %ju descriptors, and at most %ju are allowed: raise "
		    "the hard limit (ulimit -Hn) or use fewer connections", opt.connections,
		    (uintmax_t)need, (uintmax_t)limit.rlim_max);
	}
}

static void watch(int fd, enum special what)
{
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = SPECIAL | what };

	if (!epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event))
		return;
	if (what == ON_STDIN)
		die(USAGE, "--control needs a pipe or a terminal as stdin: %s", strerror(errno));
	die(OTHER, "cannot watch a descriptor: %s", strerror(errno));
}

static void set_up(void)
{
	sigset_t signals;
	int signal_fd;

	raise_descriptor_limit();
	conns = allocate(opt.connections, sizeof(*conns));
	free_slots = allocate(opt.connections, sizeof(*free_slots));
	expected_words = allocate(SEND_CHUNK / 8 + 2, 8);
	buffer = allocate(MAX_SIZE + SLACK, 1);
	for (uint32_t i = opt.connections; i-- > 0;) {
		conns[i].fd = -1;
		free_slots[n_free++] = i;
	}
	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&signals);
	sigaddset(&signals, SIGINT);
	sigaddset(&signals, SIGTERM);
	sigprocmask(SIG_BLOCK, &signals, NULL);
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	signal_fd = signalfd(-1, &signals, SFD_CLOEXEC);
	if (epoll_fd < 0 || timer_fd < 0 || signal_fd < 0)
		die(OTHER, "cannot make a descriptor: %s", strerror(errno));
	watch(timer_fd, ON_TIMER);
	watch(signal_fd, ON_SIGNAL);
	if (opt.control)
		watch(STDIN_FILENO, ON_STDIN);
	samples_open(&latency, opt.latency_file);
	samples_open(&connect_latency, opt.connect_latency_file);
}

/* The next command line, without its end; NULL: the run is to end. Valid until the next call. */
static const char *next_command(void)
{
	static char line[sizeof(commands)];
	char *end;
	size_t length;

	while (!(end = memchr(commands, '\n', n_commands))) {
		if (stopped())
			return NULL;
		wait_events(0);
	}
	if (stopped())
		return NULL;
	length = (size_t)(end - commands);
	memcpy(line, commands, length);
	line[length] = '\0';
	n_commands -= length + 1;
	memmove(commands, end + 1, n_commands);
	return line;
}

static void phase_by_default(const char *why)
{
	if (!opt.transactions && !(opt.seconds > 0))
		die(USAGE, "%s: say how many transactions", why);
	run_phase(opt.transactions, opt.seconds);
}

/* True: there was a phase. False: finish. */
static bool obey(const char *line)
{
	uint64_t n;

	finishing = !strcmp(line, "finish");
	if (finishing)
		return false;
	if (!strcmp(line, "go")) {
		phase_by_default("go");
		return true;
	}
	if (strncmp(line, "go ", 3))
		die(USAGE, "unknown command `%s': say `go', `go N' or `finish'", line);
	n = number("control: go", line + 3, 1, 1000000000000);
	check_whole("go", n);
	run_phase(n, 0);
	return true;
}

static void run_controlled(void)
{
	const char *line;

	fputs("ready", stdout);
	end_line();
	while ((line = next_command()) && obey(line) && !stopped()) {
		fputs("done ", stdout);
		put_phase(stdout, phase);
		end_line();
		new_phase();
	}
}

int main(int argc, char **argv)
{
	parse_options(argc, argv);
	set_up();

	new_phase();
	warming_up = true;
	run_phase(opt.warm_up, 0);
	warming_up = false;
	if (!stopped()) {
		new_phase();
		if (opt.control) {
			run_controlled();
		} else {
			phase_by_default("load");
			if (!stopped())
				new_phase();
		}
	}
	if (!stopped())
		close_all();
	if (!status && total_errors)
		status = BAD;
	if (opt.control)
		fputs("result ", stdout);
	put_result(stdout);
	end_line();
	for (uint32_t i = 0; i < opt.connections; i++)
		if (conns[i].state != FREE)
			reset(&conns[i]);
	free(conns);
	free(free_slots);
	free(expected_words);
	free(buffer);
	free(phases);
	return status;
}
