/*
 * exact-clients - the clients of an exact run: several load generators, one window at a time
 *
 *	exact-clients FIRST-CPU CLIENTS WARM-UP,WINDOW,... LOADGEN-OPTION...
 *
 * One loadgen runs on each CPU from FIRST-CPU on, with options of its own: a seed, and the number
 * of transactions of each window. All begin a window together, and when all of them have ended it
 * and drained, the mark is made: a system call that nothing else here makes, at whose entry the
 * probe stops the machine until the counters have been read.
 *
 * Prints what each loadgen says of its run, one JSON object a line. Exit status: 0, or that of the
 * first loadgen that failed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_CLIENTS = 64, MAX_WINDOWS = 16, MAX_OPTIONS = 64 };

static struct client {
	pid_t pid;
	FILE *in, *out;
} clients[MAX_CLIENTS];

static int nr_clients;

__attribute__((format(printf, 1, 2))) static void give_up(const char *format, ...)
{
	va_list args;
	int i;

	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputc('\n', stderr);
	for (i = 0; i < nr_clients; i++)
		kill(clients[i].pid, SIGKILL);
	exit(1);
}

static void start(struct client *c, int cpu, char **options)
{
	int to[2], from[2];
	cpu_set_t cpus;

	if (pipe2(to, O_CLOEXEC) || pipe2(from, O_CLOEXEC))
		give_up("pipe: %s", strerror(errno));
	c->pid = fork();
	if (c->pid < 0)
		give_up("fork: %s", strerror(errno));
	if (!c->pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		CPU_ZERO(&cpus);
		CPU_SET(cpu, &cpus);
		if (sched_setaffinity(0, sizeof(cpus), &cpus)) {
			perror("sched_setaffinity");
			_exit(1);
		}
		dup2(to[0], STDIN_FILENO);
		dup2(from[1], STDOUT_FILENO);
		execvp("loadgen", options);
		perror("loadgen");
		_exit(1);
	}
	close(to[0]);
	close(from[1]);
	c->in = fdopen(to[1], "w");
	c->out = fdopen(from[0], "r");
	nr_clients++;
}

/* Read a client's next line, which must begin with @word; returns what follows it. */
static char *expect(struct client *c, const char *word)
{
	static char *line;
	static size_t size;
	size_t length = strlen(word);

	if (getline(&line, &size, c->out) < 0)
		give_up("client %d ended before it said \"%s\"", (int)(c - clients), word);
	if (strncmp(line, word, length))
		give_up("client %d: %s", (int)(c - clients), line);
	return line + length;
}

static void expect_all(const char *word)
{
	int i;

	for (i = 0; i < nr_clients; i++)
		expect(&clients[i], word);
}

__attribute__((format(printf, 1, 2))) static void tell_all(const char *format, ...)
{
	va_list args;
	int i;

	for (i = 0; i < nr_clients; i++) {
		va_start(args, format);
		vfprintf(clients[i].in, format, args);
		va_end(args);
		if (fflush(clients[i].in))
			give_up("client %d takes no command: %s", i, strerror(errno));
	}
}

static void mark(void)
{
	syscall(SYS_personality, 0xffffffffUL);
}

int main(int argc, char **argv)
{
	long windows[MAX_WINDOWS];
	char *options[MAX_OPTIONS + 8], warm_up[24], seed[24], *word;
	int i, n, first, wanted, nr_windows = 0, result = 0;

	if (argc < 5 || argc > MAX_OPTIONS) {
		fputs("usage: exact-clients FIRST-CPU CLIENTS WARM-UP,WINDOW,... LOADGEN-OPTION...\n",
		      stderr);
		return 2;
	}
	first = atoi(argv[1]);
	wanted = atoi(argv[2]);
	for (word = strtok(argv[3], ","); word && nr_windows < MAX_WINDOWS; word = strtok(NULL, ","))
		windows[nr_windows++] = atol(word);
	if (wanted < 1 || wanted > MAX_CLIENTS || nr_windows < 2) {
		fprintf(stderr, "1 to %d clients, a warm-up and 1 to %d windows\n", MAX_CLIENTS,
			MAX_WINDOWS - 1);
		return 2;
	}
	signal(SIGPIPE, SIG_IGN);

	n = 0;
	options[n++] = "loadgen";
	options[n++] = "--control";
	options[n++] = "--warm-up";
	options[n++] = warm_up;
	options[n++] = "--seed";
	options[n++] = seed;
	for (i = 4; i < argc; i++)
		options[n++] = argv[i];
	options[n] = NULL;
	snprintf(warm_up, sizeof(warm_up), "%ld", windows[0]);
	for (i = 0; i < wanted; i++) {
		snprintf(seed, sizeof(seed), "%d", i + 1);
		start(&clients[i], first + i, options);
	}
	expect_all("ready");
	mark();
	for (i = 1; i < nr_windows; i++) {
		tell_all("go %ld\n", windows[i]);
		expect_all("done ");
		mark();
	}
	tell_all("finish\n");
	for (i = 0; i < nr_clients; i++)
		fputs(expect(&clients[i], "result "), stdout);
	for (i = 0; i < nr_clients; i++) {
		int status;

		waitpid(clients[i].pid, &status, 0);
		if (!result && status)
			result = WIFEXITED(status) ? WEXITSTATUS(status) : 1;
	}
	return result;
}
