/*
 * What smtp-dup's design costs without Python: the limit that its figures are measured against.
 *
 *     limit PORT PRIMARY_PORT BACKUP_PORT REDIS_SOCKET
 *
 * The same order of things, for mail that goes through: MAIL, RCPT and DATA go to the primary one by one and its
 * replies come back; before the final dot the copy is in Redis (fsync, since that is how the server is run); after the
 * primary's 250 it is released in Redis, then the client hears the reply. A second process has the copy from the first
 * one's memory, over a socket pair, delivers it over twenty kept connections and settles it in Redis.
 *
 * A program for a benchmark, not a relay: whatever else happens (a refusal, a lost connection, a client that
 * pipelines after DATA) ends it with a line on standard error. It neither compresses nor hashes the body.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { TURN = 256, AT_ONCE = 20, READ = 65536 };

typedef struct { char *data; size_t start, end, room; } Buffer;

typedef enum { LISTENER, CLIENT, SERVER, REDIS, PAIR } Kind;

/* Of a client: what it waits for. Of a server: what its next reply is to. */
typedef enum { COMMAND, REPLY, BODY, STORED, TAKEN, RELEASED, GREETING, HELLO, IDLE, ENVELOPE, START, DOT } State;

typedef struct Message {
    struct Message *next;
    char id[24];
    Buffer envelope, body; /* the command lines as the client sent them; the body with its dots doubled, no final dot */
} Message;

typedef struct Connection {
    Kind kind;
    State state;
    int fd, writable, left, closing;
    Buffer in, out;
    struct Connection *peer, *next_idle, *next_dirty;
    int dirty;
    Message *message;
} Connection;

/* An answer that Redis owes: after so many replies somebody goes on. */
typedef struct Owed { struct Owed *next; int replies; Connection *whose; Message *settled; } Owed;

static int poller, is_deliverer, opened, target;
static Connection *redis, *pair, *idle, *dirty;
static Owed *owed_first, *owed_last;
static Message *waiting_first, *waiting_last;
static uint64_t counter;

static void fail(const char *format, ...) {
    va_list words;
    va_start(words, format);
    fprintf(stderr, "limit: ");
    vfprintf(stderr, format, words);
    fprintf(stderr, "\n");
    va_end(words);
    exit(1);
}

/* Buffers */

static void reserve(Buffer *b, size_t size) {
    if (b->end + size <= b->room) return;
    size_t used = b->end - b->start;
    if (b->start) memmove(b->data, b->data + b->start, used);
    b->start = 0, b->end = used;
    if (used + size > b->room) {
        b->room = (used + size) * 2;
        if (!(b->data = realloc(b->data, b->room))) fail("no memory");
    }
}

static void put(Buffer *b, const void *data, size_t size) {
    reserve(b, size);
    memcpy(b->data + b->end, data, size);
    b->end += size;
}

static void print(Buffer *b, const char *format, ...) {
    va_list words;
    va_start(words, format);
    reserve(b, 512);
    b->end += vsnprintf(b->data + b->end, 512, format, words);
    va_end(words);
}

static size_t length(const Buffer *b) { return b->end - b->start; }

static void empty(Buffer *b) { b->start = b->end = 0; }

/* Takes a line with its CRLF out of a buffer; 0 when there is none. */
static size_t line(Buffer *b, char **text) {
    char *end = memchr(b->data + b->start, '\n', length(b));
    if (!end) return 0;
    *text = b->data + b->start;
    size_t size = end + 1 - *text;
    b->start += size;
    return size;
}

static void drop(Message *m) {
    free(m->envelope.data);
    free(m->body.data);
    free(m);
}

/* Connections */

static void watch(Connection *c, int writable) {
    struct epoll_event event = {EPOLLIN | (writable ? EPOLLOUT : 0), {.ptr = c}};
    if (epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event)) fail("epoll: %s", strerror(errno));
    c->writable = writable;
}

static Connection *connection(int fd, Kind kind, State state) {
    Connection *c = calloc(1, sizeof *c);
    if (!c) fail("no memory");
    c->fd = fd, c->kind = kind, c->state = state;
    fcntl(fd, F_SETFL, O_NONBLOCK);
    struct epoll_event event = {EPOLLIN, {.ptr = c}};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event)) fail("epoll: %s", strerror(errno));
    return c;
}

static struct sockaddr_in loopback(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

static void prompt(int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

static Connection *server(void) {
    struct sockaddr_in address = loopback(target);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (void *)&address, sizeof address)) fail("port %d: %s", target, strerror(errno));
    prompt(fd);
    opened++;
    return connection(fd, SERVER, GREETING);
}

/* What is written in a turn of the loop leaves at its end, in one piece. */
static void send_later(Connection *c) {
    if (c->dirty) return;
    c->dirty = 1;
    c->next_dirty = dirty;
    dirty = c;
}

/* Past the buffer, in which the first transaction waits for the reply to this. */
static void hello(Connection *c) {
    if (write(c->fd, "EHLO limit\r\n", 12) != 12) fail("write: %s", strerror(errno));
    c->state = HELLO;
}

static void flush(Connection *c) {
    while (length(&c->out)) {
        ssize_t n = write(c->fd, c->out.data + c->out.start, length(&c->out));
        if (n < 0 && errno == EAGAIN) {
            if (!c->writable) watch(c, 1);
            return;
        }
        if (n < 0) fail("write: %s", strerror(errno));
        c->out.start += n;
    }
    empty(&c->out);
    if (c->writable) watch(c, 0);
}

/* Redis */

static void word(const void *data, size_t size) {
    print(&redis->out, "$%zu\r\n", size);
    put(&redis->out, data, size);
    put(&redis->out, "\r\n", 2);
}

static void command(int count, ...) {
    va_list words;
    va_start(words, count);
    print(&redis->out, "*%d\r\n", count);
    for (int i = 0; i < count; i++) {
        const char *text = va_arg(words, const char *);
        word(text, strlen(text));
    }
    va_end(words);
    send_later(redis);
}

static void owe(int replies, Connection *whose, Message *settled) {
    Owed *o = calloc(1, sizeof *o);
    if (!o) fail("no memory");
    o->replies = replies, o->whose = whose, o->settled = settled;
    if (owed_last) owed_last->next = o; else owed_first = o;
    owed_last = o;
}

static const char *now(void) {
    static char text[32];
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    snprintf(text, sizeof text, "%ld.%06ld", (long)time.tv_sec, time.tv_nsec / 1000);
    return text;
}

static const char *key(const Message *m) {
    static char text[64];
    snprintf(text, sizeof text, "limit:message:%s", m->id);
    return text;
}

static void stage(Connection *client) {
    Message *m = client->message;
    command(4, "ZADD", "limit:staged", now(), m->id);
    print(&redis->out, "*3\r\n$3\r\nSET\r\n$%zu\r\n%s\r\n", strlen(key(m)), key(m));
    print(&redis->out, "$%zu\r\n", length(&m->envelope) + length(&m->body));
    put(&redis->out, m->envelope.data + m->envelope.start, length(&m->envelope));
    put(&redis->out, m->body.data + m->body.start, length(&m->body));
    put(&redis->out, "\r\n", 2);
    owe(2, client, NULL);
}

static void release(Connection *client) {
    command(3, "ZREM", "limit:staged", client->message->id);
    command(4, "ZADD", "limit:pending", now(), client->message->id);
    owe(2, client, NULL);
}

static void settle(Message *m) {
    command(3, "ZREM", "limit:pending", m->id);
    command(2, "DEL", key(m));
    owe(2, NULL, m);
}

/* The relay */

static void hand_over(Message *m) {
    uint32_t sizes[2] = {length(&m->envelope), length(&m->body)};
    put(&pair->out, m->id, sizeof m->id);
    put(&pair->out, sizes, sizeof sizes);
    put(&pair->out, m->envelope.data + m->envelope.start, sizes[0]);
    put(&pair->out, m->body.data + m->body.start, sizes[1]);
    send_later(pair);
}

static void reply(Connection *c, const char *text) {
    put(&c->out, text, strlen(text));
    send_later(c);
}

static void give_back(Connection *primary) {
    primary->peer = NULL;
    primary->state = IDLE;
    primary->next_idle = idle;
    idle = primary;
}

static void begin(Connection *client) {
    Message *m = client->message = calloc(1, sizeof *m);
    if (!m) fail("no memory");
    snprintf(m->id, sizeof m->id, "%016llx", (unsigned long long)++counter);
    print(&m->body, "Received: from client (localhost [127.0.0.1]) by limit with ESMTP id %s\r\n", m->id);
    Connection *primary = idle;
    if (primary) idle = primary->next_idle, primary->state = ENVELOPE; else primary = server();
    primary->peer = client;
    client->peer = primary;
}

static void pass_on(Connection *client, const char *text, size_t size) {
    Connection *primary = client->peer;
    put(&primary->out, text, size);
    if (primary->state == ENVELOPE) send_later(primary); /* else after its greeting */
    client->state = REPLY;
}

static void client_says(Connection *c) {
    char *text;
    size_t size;
    while (c->state == COMMAND && (size = line(&c->in, &text))) {
        if (!strncasecmp(text, "MAIL", 4)) begin(c);
        if (!strncasecmp(text, "EHLO", 4)) {
            reply(c, "250-limit\r\n250-PIPELINING\r\n250 8BITMIME\r\n");
        } else if (!strncasecmp(text, "HELO", 4) || !strncasecmp(text, "NOOP", 4) || !strncasecmp(text, "RSET", 4)) {
            reply(c, "250 2.0.0 Ok\r\n");
        } else if (!strncasecmp(text, "QUIT", 4)) {
            reply(c, "221 2.0.0 Bye\r\n");
            c->closing = 1;
            return;
        } else if (c->message) {
            if (strncasecmp(text, "DATA", 4)) put(&c->message->envelope, text, size);
            pass_on(c, text, size);
        } else {
            fail("unexpected command %.*s", (int)size - 2, text);
        }
    }
    if (c->state != BODY) return;
    size_t n = length(&c->in);
    char *end = c->in.data + c->in.end;
    if (n < 5 || memcmp(end - 5, "\r\n.\r\n", 5)) return;
    Message *m = c->message;
    put(&m->body, c->in.data + c->in.start, n - 3);
    empty(&c->in);
    stage(c);
    c->state = STORED;
    put(&c->peer->out, m->body.data, length(&m->body));
    send_later(c->peer);
}

static void redis_answered(Connection *client) {
    Connection *primary = client->peer;
    if (client->state == STORED) {
        client->state = TAKEN;
        primary->state = DOT;
        reply(primary, ".\r\n");
        return;
    }
    reply(client, "250 2.0.0 Ok: taken\r\n");
    hand_over(client->message);
    drop(client->message);
    client->message = NULL;
    client->state = COMMAND;
    client_says(client);
}

static void primary_says(Connection *c, const char *text, size_t size) {
    Connection *client = c->peer;
    if (c->state == GREETING) {
        hello(c);
    } else if (c->state == HELLO) {
        c->state = ENVELOPE;
        send_later(c);
    } else if (c->state == DOT) {
        if (*text != '2') fail("the primary says %.*s", (int)size - 2, text);
        give_back(c);
        client->state = RELEASED;
        release(client);
    } else if (client) {
        put(&client->out, text, size);
        send_later(client);
        client->state = *text == '3' ? BODY : COMMAND;
        client_says(client);
    }
}

/* The deliverer */

static void deliver(void) {
    while (waiting_first && (idle || opened < AT_ONCE)) {
        Message *m = waiting_first;
        if (!(waiting_first = m->next)) waiting_last = NULL;
        Connection *backup = idle;
        if (backup) idle = backup->next_idle; else backup = server();
        backup->message = m;
        put(&backup->out, m->envelope.data + m->envelope.start, length(&m->envelope));
        put(&backup->out, "DATA\r\n", 6);
        backup->left = 1;
        for (char *p = m->envelope.data + m->envelope.start; p < m->envelope.data + m->envelope.end; p++)
            backup->left += *p == '\n';
        if (backup->state == IDLE) backup->state = START, send_later(backup);
    }
}

static void backup_says(Connection *c, const char *text, size_t size) {
    if (*text != '2' && *text != '3') fail("the backup says %.*s", (int)size - 2, text);
    Message *m = c->message;
    if (c->state == GREETING) {
        hello(c);
    } else if (c->state == HELLO) {
        c->state = START;
        send_later(c);
    } else if (c->state == START && --c->left == 0) {
        put(&c->out, m->body.data + m->body.start, length(&m->body));
        reply(c, ".\r\n");
        c->state = DOT;
    } else if (c->state == DOT) {
        settle(m);
        c->message = NULL;
        give_back(c);
    }
}

static void take_over(void) {
    Buffer *b = &pair->in;
    uint32_t sizes[2];
    size_t head = sizeof ((Message *)0)->id + sizeof sizes;
    while (length(b) >= head) {
        memcpy(sizes, b->data + b->start + head - sizeof sizes, sizeof sizes);
        if (length(b) < head + sizes[0] + sizes[1]) return;
        Message *m = calloc(1, sizeof *m);
        if (!m) fail("no memory");
        memcpy(m->id, b->data + b->start, sizeof m->id);
        put(&m->envelope, b->data + b->start + head, sizes[0]);
        put(&m->body, b->data + b->start + head + sizes[0], sizes[1]);
        b->start += head + sizes[0] + sizes[1];
        if (waiting_last) waiting_last->next = m; else waiting_first = m;
        waiting_last = m;
    }
}

/* The loop */

static void redis_says(void) {
    char *text;
    size_t size;
    while ((size = line(&redis->in, &text))) {
        if (*text == '-') fail("Redis says %.*s", (int)size - 2, text);
        Owed *o = owed_first;
        if (--o->replies) continue;
        if (!(owed_first = o->next)) owed_last = NULL;
        if (o->whose) redis_answered(o->whose);
        if (o->settled) drop(o->settled);
        free(o);
    }
}

/* Reads a server's replies; only the last line of one counts. */
static void server_says(Connection *c) {
    char *text;
    size_t size;
    while ((size = line(&c->in, &text))) {
        if (size > 4 && text[3] == '-') continue;
        if (is_deliverer) backup_says(c, text, size); else primary_says(c, text, size);
    }
}

static void welcome(Connection *listener) {
    int fd;
    while ((fd = accept4(listener->fd, NULL, NULL, SOCK_CLOEXEC)) >= 0) {
        prompt(fd);
        reply(connection(fd, CLIENT, COMMAND), "220 limit ESMTP\r\n");
    }
}

static void gone(Connection *c) {
    if (c->kind == PAIR && is_deliverer) exit(0);
    if (c->kind != CLIENT || c->message) fail("a connection was lost");
    close(c->fd);
    free(c->in.data);
    free(c->out.data);
    free(c);
}

static void readable(Connection *c) {
    for (;;) {
        reserve(&c->in, READ);
        ssize_t n = read(c->fd, c->in.data + c->in.end, READ);
        if (n < 0 && errno == EAGAIN) break;
        if (n <= 0) {
            gone(c);
            return;
        }
        c->in.end += n;
        if (n < READ) break;
    }
    if (c->kind == CLIENT) client_says(c);
    else if (c->kind == SERVER) server_says(c);
    else if (c->kind == REDIS) redis_says();
    else take_over();
    if (!length(&c->in)) empty(&c->in);
}

static void run(void) {
    struct epoll_event events[TURN];
    for (;;) {
        int n = epoll_wait(poller, events, TURN, -1);
        if (n < 0 && errno != EINTR) fail("epoll: %s", strerror(errno));
        for (int i = 0; i < n; i++) {
            Connection *c = events[i].data.ptr;
            if (c->kind == LISTENER) {
                welcome(c);
                continue;
            }
            if (events[i].events & EPOLLOUT) send_later(c);
            if (events[i].events & ~EPOLLOUT) readable(c);
        }
        if (is_deliverer) deliver();
        while (dirty) {
            Connection *c = dirty;
            dirty = c->next_dirty;
            c->dirty = 0;
            flush(c);
            if (c->closing) shutdown(c->fd, SHUT_WR), c->closing = 0;
        }
    }
}

int main(int argc, char **argv) {
    if (argc != 5) fail("usage: limit PORT PRIMARY_PORT BACKUP_PORT REDIS_SOCKET");
    int sockets[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets)) fail("socketpair: %s", strerror(errno));
    is_deliverer = fork() == 0;
    close(sockets[!is_deliverer]);
    target = atoi(argv[is_deliverer ? 3 : 2]);
    poller = epoll_create1(EPOLL_CLOEXEC);
    pair = connection(sockets[is_deliverer], PAIR, IDLE);
    struct sockaddr_un there = {.sun_family = AF_UNIX};
    snprintf(there.sun_path, sizeof there.sun_path, "%s", argv[4]);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, (void *)&there, sizeof there)) fail("Redis: %s", strerror(errno));
    redis = connection(fd, REDIS, IDLE);
    if (!is_deliverer) {
        struct sockaddr_in here = loopback(atoi(argv[1]));
        int on = 1;
        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (bind(fd, (void *)&here, sizeof here) || listen(fd, 1000)) fail("port %s: %s", argv[1], strerror(errno));
        connection(fd, LISTENER, IDLE);
    }
    run();
}
