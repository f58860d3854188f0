/* A machine of two domains in C: the engine is its hypervisor, and each domain has the guest driver.
 *
 * The "hypervisor" keeps one array of frames; a domain's memory is a part of it, and a mapping is an entry in a list of
 * "virtual addresses". Everything that grants need is in the callbacks below.
 */
#include <gnttab.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(what)                                                            \
    do {                                                                       \
        if (!(what)) {                                                         \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what);         \
            exit(1);                                                           \
        }                                                                      \
    } while (0)

enum { PAGE = 4096, DOMAINS = 3, PAGES = 16, TABLE_FRAMES = 8, WINDOW_PAGES = 8 };
enum { E_SRCH = -3, E_BUSY = -16, E_INVAL = -22, E_NOSYS = -38, BAD_GNTREF = -3, GENERAL_ERROR = -1 };
#define WINDOW 0x100000000ull

struct machine {
    /* Frame n of domain d is d * PAGES + n, for guest frame number n. */
    unsigned char frames[DOMAINS * PAGES][PAGE];
    int references[DOMAINS * PAGES];
    int table_pages;
    struct gnttab_engine *engine;
};

struct guest {
    struct machine *machine;
    uint16_t id;
    void *table[TABLE_FRAMES];
    struct {
        uint64_t mfn;
        bool mapped, readonly;
    } window[WINDOW_PAGES];
    struct gnttab_guest *driver;
};

static struct guest guests[DOMAINS];

/* --- what the hypervisor does for the engine ------------------------------------------------------------------------ */

static int32_t resolve(void *ctx, uint16_t domain, uint64_t gfn, bool write, uint64_t *mfn)
{
    struct machine *machine = ctx;
    (void)write;
    if (domain >= DOMAINS || gfn >= PAGES)
        return E_INVAL;
    *mfn = (uint64_t)domain * PAGES + gfn;
    machine->references[*mfn]++;
    return 0;
}

static int32_t get_frame(void *ctx, uint64_t mfn, uint16_t *owner)
{
    struct machine *machine = ctx;
    machine->references[mfn]++;
    *owner = (uint16_t)(mfn / PAGES);
    return 0;
}

static void put_frame(void *ctx, uint64_t mfn)
{
    struct machine *machine = ctx;
    CHECK(machine->references[mfn]-- > 0);
}

static bool get_writable(void *ctx, uint64_t mfn)
{
    (void)ctx, (void)mfn;
    return true;
}

static void put_writable(void *ctx, uint64_t mfn)
{
    (void)ctx, (void)mfn;
}

static void copy(void *ctx, uint64_t source, uint16_t from, uint64_t dest, uint16_t to, uint16_t len)
{
    struct machine *machine = ctx;
    memmove(machine->frames[dest] + to, machine->frames[source] + from, len);
}

static int32_t map_host(void *ctx, uint16_t domain, uint64_t addr, uint64_t mfn, bool readonly)
{
    uint64_t at = (addr - WINDOW) / PAGE;
    (void)ctx;
    if (at >= WINDOW_PAGES || guests[domain].window[at].mapped)
        return E_INVAL;
    guests[domain].window[at].mfn = mfn;
    guests[domain].window[at].mapped = true;
    guests[domain].window[at].readonly = readonly;
    return 0;
}

static int32_t unmap_host(void *ctx, uint16_t domain, uint64_t addr, uint64_t mfn)
{
    uint64_t at = (addr - WINDOW) / PAGE;
    (void)ctx;
    if (at >= WINDOW_PAGES || !guests[domain].window[at].mapped || guests[domain].window[at].mfn != mfn)
        return E_INVAL;
    guests[domain].window[at].mapped = false;
    return 0;
}

static void flush(void *ctx, uint16_t domain)
{
    (void)ctx, (void)domain;
}

static void *alloc_table_page(void *ctx, uint16_t domain)
{
    struct machine *machine = ctx;
    void *page = aligned_alloc(PAGE, PAGE);
    (void)domain;
    if (page) {
        memset(page, 0, PAGE);
        machine->table_pages++;
    }
    return page;
}

static void free_table_page(void *ctx, void *page)
{
    struct machine *machine = ctx;
    machine->table_pages--;
    free(page);
}

static int32_t place_table_page(void *ctx, uint16_t domain, void *page, uint64_t gfn)
{
    (void)ctx;
    if (gfn >= TABLE_FRAMES)
        return E_INVAL;
    guests[domain].table[gfn] = page;
    return 0;
}

/* --- what a domain's kernel does for its driver --------------------------------------------------------------------- */

/* The layouts of the typed door are those of the hypercall. */
static int32_t hypercall(void *ctx, uint32_t command, void *arguments, uint32_t count)
{
    struct guest *guest = ctx;
    struct gnttab_engine *engine = guest->machine->engine;
    switch (command) {
    case 0:
        return gnttab_map(engine, guest->id, arguments, count);
    case 1:
        return gnttab_unmap(engine, guest->id, arguments, count);
    case 5:
        return gnttab_copy(engine, guest->id, arguments, count);
    case 6:
        return gnttab_query_size(engine, guest->id, arguments);
    case 8:
        return gnttab_set_version(engine, guest->id, *(uint32_t *)arguments);
    default:
        return E_NOSYS;
    }
}

static int32_t place(void *ctx, uint64_t index)
{
    struct guest *guest = ctx;
    return gnttab_place_frame(guest->machine->engine, guest->id, index, index);
}

static void *frame(void *ctx, uint64_t index)
{
    struct guest *guest = ctx;
    return index < TABLE_FRAMES ? guest->table[index] : NULL;
}

static void sleep_ms(void *ctx, uint32_t ms)
{
    (void)ctx, (void)ms;
}

/* Where a domain sees a mapped page. */
static unsigned char *seen(struct guest *guest, uint64_t addr)
{
    uint64_t at = (addr - WINDOW) / PAGE;
    CHECK(at < WINDOW_PAGES && guest->window[at].mapped);
    return guest->machine->frames[guest->window[at].mfn];
}

static void start(struct machine *machine, uint16_t id)
{
    struct guest *guest = &guests[id];
    struct gnttab_guest_ops ops = {
        .ctx = guest,
        .hypercall = hypercall,
        .place = place,
        .frame = frame,
        .sleep_ms = sleep_ms,
    };
    guest->machine = machine;
    guest->id = id;
    CHECK(gnttab_domain_create(machine->engine, id, 4, 4) == 0);
    CHECK(gnttab_guest_new(&ops, 1, WINDOW, WINDOW_PAGES, &guest->driver) == 0);
}

int main(void)
{
    static struct machine machine;
    struct gnttab_hypervisor_ops ops = {
        .ctx = &machine,
        .resolve = resolve,
        .get_frame = get_frame,
        .put_frame = put_frame,
        .get_writable = get_writable,
        .put_writable = put_writable,
        .copy = copy,
        .map_host = map_host,
        .unmap_host = unmap_host,
        .flush = flush,
        .alloc_table_page = alloc_table_page,
        .free_table_page = free_table_page,
        .place_table_page = place_table_page,
    };
    machine.engine = gnttab_engine_new(&ops, 4);
    CHECK(machine.engine != NULL);
    start(&machine, 1);
    start(&machine, 2);
    CHECK(gnttab_domain_create(machine.engine, 1, 4, 4) == E_BUSY);

    /* d1 grants its page 3 to d2, which maps it and reads. */
    struct guest *granter = &guests[1], *grantee = &guests[2];
    unsigned char *page = machine.frames[1 * PAGES + 3];
    uint32_t gref, handle;
    uint64_t addr;
    strcpy((char *)page, "hello from d1");
    CHECK(gnttab_guest_grant(granter->driver, 2, 3, false, &gref) == 0);
    CHECK(gnttab_guest_map(grantee->driver, 1, gref, false, &addr, &handle) == 0);
    printf("d2 has mapped reference %#x of d1 at %#llx and reads: %s\n", gref, (unsigned long long)addr,
           (char *)seen(grantee, addr));
    strcpy((char *)seen(grantee, addr), "hello from d2");
    CHECK(strcmp((char *)page, "hello from d2") == 0);

    /* Access does not end while d2 has it. */
    CHECK(gnttab_guest_end(granter->driver, gref) == E_BUSY);
    CHECK(gnttab_guest_unmap(grantee->driver, handle) == 0);
    CHECK(gnttab_guest_unmap(grantee->driver, handle) == E_INVAL);
    CHECK(gnttab_guest_end(granter->driver, gref) == 0);
    CHECK(gnttab_guest_end(granter->driver, gref) == E_INVAL);
    puts("d1 ends access: not while d2 has the page, and then it does");

    /* What was not granted, or not so, is refused by the hypervisor. */
    CHECK(gnttab_guest_map(grantee->driver, 1, gref, false, &addr, &handle) == GENERAL_ERROR);
    CHECK(gnttab_guest_map(grantee->driver, 1, 100000, false, &addr, &handle) == BAD_GNTREF);
    CHECK(gnttab_guest_grant(granter->driver, 2, 4, true, &gref) == 0);
    CHECK(gnttab_guest_map(grantee->driver, 1, gref, false, &addr, &handle) == GENERAL_ERROR);
    puts("d2 maps nothing that it was not granted");

    /* A copy by the typed door: 5 bytes of d1's page to d2's page 0. */
    memcpy(machine.frames[1 * PAGES + 4] + 10, "12345", 5);
    struct gnttab_copy_item item = {
        .source = {.u = gref, .domid = 1, .offset = 10},
        .dest = {.u = 0, .domid = 0x7ff0, .offset = 0},
        .len = 5,
        .flags = 1,
    };
    CHECK(gnttab_copy(machine.engine, 2, &item, 1) == 0 && item.status == 0);
    CHECK(memcmp(machine.frames[2 * PAGES], "12345", 5) == 0);
    puts("d2 has had 5 bytes copied");

    /* d2 dies with a page mapped: d1 gets it back, and no reference is left. */
    CHECK(gnttab_guest_map(grantee->driver, 1, gref, true, &addr, &handle) == 0);
    CHECK(gnttab_domain_destroy(machine.engine, 2) == 0);
    CHECK(gnttab_domain_destroy(machine.engine, 2) == E_SRCH);
    CHECK(gnttab_guest_end(granter->driver, gref) == 0);
    for (int mfn = 0; mfn < DOMAINS * PAGES; mfn++)
        CHECK(machine.references[mfn] == 0);
    puts("d2 has died with a page mapped; every frame has been put back");

    gnttab_guest_free(grantee->driver);
    gnttab_guest_free(granter->driver);
    CHECK(gnttab_domain_destroy(machine.engine, 1) == 0);
    gnttab_engine_free(machine.engine);
    CHECK(machine.table_pages == 0);
    return 0;
}
