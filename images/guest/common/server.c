#define _GNU_SOURCE
#include "server.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { DEFAULT_PORT = 5000, DEFAULT_BUFFER = 16384, DEFAULT_BACKLOG = 16384 };

static int ready_pipe = -1;	/* write end, while somebody waits for us */
static atomic_int not_ready;
static void (*run_thread)(struct server_thread *);

void server_fail(const char *what, int error)
{
	fprintf(stderr, "%s: %s\n", what, strerror(error));
	exit(1);
}

void server_ready(void)
{
	if (atomic_fetch_sub(&not_ready, 1) != 1 || ready_pipe < 0)
		return;
	/* Nobody reads our output from here on; do not hold it open. */
	int null = open("/dev/null", O_RDWR);

	dup2(null, STDOUT_FILENO);
	if (write(ready_pipe, "r", 1) != 1)
		server_fail("telling the starter", errno);
	close(ready_pipe);
}

/* Linked by their first word. */
static _Thread_local void **stock;

void *server_connection_get(size_t bytes)
{
	void **connection = stock;

	if (!connection)
		return malloc(bytes);
	stock = *connection;
	return connection;
}

void server_connection_put(void *connection)
{
	*(void **)connection = stock;
	stock = connection;
}

static void usage(const char *about, const char *name)
{
	printf("usage: %s [options]\n%s\n\n"
	       "  --port N          listen on this port (%d)\n"
	       "  --threads N       threads, pinned to CPU 0, 1, ... (one per CPU)\n"
	       "  --buffer BYTES    read at most so much at a time (%d)\n"
	       "  --backlog N       connections that may wait to be accepted (%d)\n"
	       "  --daemon          return when ready, serve in the background\n"
	       "  --reuseport       a listener for each thread: SO_REUSEPORT and SO_INCOMING_CPU\n"
	       "                    (epoll-server and uring-server)\n"
	       "epoll-server only:\n"
	       "  --exclusive       an arriving connection wakes one thread: EPOLLEXCLUSIVE\n"
	       "uring-server only:\n"
	       "  --buffers N       for what a thread has received and not sent; a power of two (as\n"
	       "                    many as fit into 8 MiB, from 16 to 4096)\n"
	       "mp-server only:\n"
	       "  --batch           switch batching on\n"
	       "  --partition       give each thread an accept queue of its own\n"
	       "  --lwsocket        accept connections without descriptors\n"
	       "  --threshold N     requests that gather before they go down (32)\n"
	       "  --accepts N       connections per accept request (1; 64 with --partition)\n"
	       "  --requests N      size of the request ring (256)\n"
	       "  --completions N   size of the completion ring (4096)\n"
	       "mp-server only, to try what a lab must get right:\n"
	       "  --cycles N        make and undo the partition N times before serving\n"
	       "  --overlap         fail unless a second part with the same CPU is refused\n"
	       "  --rest            accept also what arrives on CPUs of no part\n"
	       "  --convert N       make an lwsocket a descriptor after its Nth message, and go on\n"
	       "  --leave           every second one of these then leaves its channel\n",
	       name, about, DEFAULT_PORT, DEFAULT_BUFFER, DEFAULT_BACKLOG);
}

static int number(const char *option, const char *text, long min, long max)
{
	char *end;
	long value;

	errno = 0;
	value = strtol(text, &end, 10);
	if (errno || end == text || *end || value < min || value > max) {
		fprintf(stderr, "--%s: %s is not a number from %ld to %ld\n", option, text, min, max);
		exit(2);
	}
	return value;
}

/* @cpu: take handshakes that arrive there, of several listeners on this port; or -1 */
static int listen_on(const struct server_options *o, int cpu)
{
	struct sockaddr_in address = {
		.sin_family = AF_INET,
		.sin_port = htons(o->port),
		.sin_addr.s_addr = htonl(INADDR_ANY),
	};
	int on = 1;
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0)
		server_fail("socket", errno);
	if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)))
		server_fail("SO_REUSEADDR", errno);
	/* A reply must not wait for the client's delayed ACK; connections inherit this. */
	if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)))
		server_fail("TCP_NODELAY", errno);
	/* Before bind(): the group of listeners is formed there. */
	if (cpu >= 0 && setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on)))
		server_fail("SO_REUSEPORT", errno);
	if (cpu >= 0 && setsockopt(fd, SOL_SOCKET, SO_INCOMING_CPU, &cpu, sizeof(cpu)))
		server_fail("SO_INCOMING_CPU", errno);
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)))
		server_fail("bind", errno);
	if (listen(fd, o->backlog))
		server_fail("listen", errno);
	return fd;
}

static void *thread_main(void *argument)
{
	struct server_thread *thread = argument;
	cpu_set_t cpu;

	CPU_ZERO(&cpu);
	CPU_SET(thread->index, &cpu);
	if (sched_setaffinity(0, sizeof(cpu), &cpu))
		server_fail("sched_setaffinity", errno);
	run_thread(thread);
	return NULL;
}

/* Returns in the child; the parent waits for the child's word and exits. */
static void become_daemon(void)
{
	int ends[2];
	char word;
	pid_t pid;

	if (pipe2(ends, O_CLOEXEC))
		server_fail("pipe", errno);
	pid = fork();
	if (pid < 0)
		server_fail("fork", errno);
	if (pid) {
		close(ends[1]);
		/* _exit: the child has the same buffered output. */
		_exit(read(ends[0], &word, 1) == 1 ? 0 : 1);
	}
	close(ends[0]);
	setsid();
	ready_pipe = ends[1];
}

static int start(int argc, char **argv, const char *about, void (*run)(struct server_thread *),
		 bool in_kernel)
{
	enum { PORT = 256, THREADS, BUFFER, DAEMON, EXCLUSIVE, REUSEPORT, BUFFERS, BATCH, PARTITION,
	       LWSOCKET, THRESHOLD, ACCEPTS, REQUESTS, COMPLETIONS, BACKLOG, CYCLES, OVERLAP,
	       REST, CONVERT, LEAVE, HELP };
	static const struct option known[] = {
		{ "port", required_argument, NULL, PORT },
		{ "threads", required_argument, NULL, THREADS },
		{ "buffer", required_argument, NULL, BUFFER },
		{ "daemon", no_argument, NULL, DAEMON },
		{ "exclusive", no_argument, NULL, EXCLUSIVE },
		{ "reuseport", no_argument, NULL, REUSEPORT },
		{ "buffers", required_argument, NULL, BUFFERS },
		{ "batch", no_argument, NULL, BATCH },
		{ "partition", no_argument, NULL, PARTITION },
		{ "lwsocket", no_argument, NULL, LWSOCKET },
		{ "threshold", required_argument, NULL, THRESHOLD },
		{ "accepts", required_argument, NULL, ACCEPTS },
		{ "requests", required_argument, NULL, REQUESTS },
		{ "completions", required_argument, NULL, COMPLETIONS },
		{ "backlog", required_argument, NULL, BACKLOG },
		{ "cycles", required_argument, NULL, CYCLES },
		{ "overlap", no_argument, NULL, OVERLAP },
		{ "rest", no_argument, NULL, REST },
		{ "convert", required_argument, NULL, CONVERT },
		{ "leave", no_argument, NULL, LEAVE },
		{ "help", no_argument, NULL, HELP },
		{ }
	};
	int cpus = sysconf(_SC_NPROCESSORS_ONLN);
	static struct server_options options;
	struct server_thread *threads;
	int which, c;
	bool daemon = false;
	pthread_t id;

	options.port = DEFAULT_PORT;
	options.threads = cpus;
	options.buffer = DEFAULT_BUFFER;
	options.backlog = DEFAULT_BACKLOG;
	while ((c = getopt_long(argc, argv, "", known, &which)) != -1) {
		const char *name = c == '?' ? "" : known[which].name;

		switch (c) {
		case PORT:
			options.port = number(name, optarg, 1, 65535);
			break;
		case THREADS:
			options.threads = number(name, optarg, 1, cpus);
			break;
		case BUFFER:
			options.buffer = number(name, optarg, 1, 1 << 20);
			break;
		case DAEMON:
			daemon = true;
			break;
		case EXCLUSIVE:
			options.exclusive = true;
			break;
		case REUSEPORT:
			options.reuseport = true;
			break;
		case BUFFERS:
			options.buffers = number(name, optarg, 1, 32768);
			break;
		case BATCH:
			options.batch = true;
			break;
		case PARTITION:
			options.partition = true;
			break;
		case LWSOCKET:
			options.lwsocket = true;
			break;
		case THRESHOLD:
			options.threshold = number(name, optarg, 1, 32768);
			break;
		case ACCEPTS:
			options.accepts = number(name, optarg, 1, 1 << 20);
			break;
		case REQUESTS:
			options.requests = number(name, optarg, 1, 32768);
			break;
		case COMPLETIONS:
			options.completions = number(name, optarg, 1, 32768);
			break;
		case BACKLOG:
			options.backlog = number(name, optarg, 1, 1 << 20);
			break;
		case CYCLES:
			options.cycles = number(name, optarg, 1, 1 << 20);
			break;
		case OVERLAP:
			options.overlap = true;
			break;
		case REST:
			options.rest = true;
			break;
		case CONVERT:
			options.convert = number(name, optarg, 1, 1 << 20);
			break;
		case LEAVE:
			options.leave = true;
			break;
		case HELP:
			usage(about, argv[0]);
			exit(0);
		default:
			fprintf(stderr, "see %s --help\n", argv[0]);
			exit(2);
		}
	}
	if (optind < argc) {
		fprintf(stderr, "%s: what is '%s'? see --help\n", argv[0], argv[optind]);
		exit(2);
	}

	/* Of a shared queue, one at a time: the others want some, too. */
	if (!options.accepts)
		options.accepts = options.partition ? 64 : 1;
	signal(SIGPIPE, SIG_IGN);
	if (in_kernel)
		options.threads = 1;
	threads = calloc(options.threads, sizeof(*threads));
	if (!threads)
		server_fail("threads", ENOMEM);
	for (int i = 0; i < options.threads; i++) {
		threads[i] = (struct server_thread){ .options = &options, .index = i };
		if (in_kernel)
			threads[i].listener = -1;
		else if (options.reuseport)
			threads[i].listener = listen_on(&options, i);
		else
			threads[i].listener = i ? threads[0].listener : listen_on(&options, -1);
	}
	if (daemon)
		become_daemon();
	run_thread = run;
	atomic_store(&not_ready, options.threads);
	for (int i = 0; i < options.threads; i++) {
		if (pthread_create(&id, NULL, thread_main, &threads[i]))
			server_fail("pthread_create", EAGAIN);
	}
	for (;;)
		pause();
}

int server_main(int argc, char **argv, const char *about, void (*run)(struct server_thread *))
{
	return start(argc, argv, about, run, false);
}

int server_main_in_kernel(int argc, char **argv, const char *about,
			  void (*run)(struct server_thread *))
{
	return start(argc, argv, about, run, true);
}
