/* Grant tables for C: the guest driver, and the engine over a hypervisor of yours.
 *
 * Made from crates/capi by: cargo test -p gnttab-capi --test header -- --ignored
 * Link with libgnttab_c.a. Every function answers 0 or a negative errno of Xen's, as a hypercall does.
 */

#ifndef GNTTAB_H
#define GNTTAB_H

#include <stdbool.h>
#include <stdint.h>

/*
 An engine; opaque to C.
 */
struct gnttab_engine;

/*
 A domain's driver; opaque to C.
 */
struct gnttab_guest;

/*
 What a hypervisor does for the engine. Every function gets `ctx` first; domains go by their numbers.

 A reference taken on a frame keeps its memory alive until it is put, whatever its owner does.
 */
struct gnttab_hypervisor_ops {
  /*
   Whatever the functions need.
   */
  void *ctx;
  /*
   The frame behind a guest frame number of a domain, with one reference taken: 0, -EINVAL (not a page that it may
   grant) or -EAGAIN.
   */
  int32_t (*resolve)(void *ctx, uint16_t domain, uint64_t gfn, bool write, uint64_t *mfn);
  /*
   One more reference on a frame, and whose it is: 0, or negative if it is on its way out.
   */
  int32_t (*get_frame)(void *ctx, uint64_t mfn, uint16_t *owner);
  /*
   One reference less.
   */
  void (*put_frame)(void *ctx, uint64_t mfn);
  /*
   Takes the right to write to a frame; false if it is in use as something else.
   */
  bool (*get_writable)(void *ctx, uint64_t mfn);
  /*
   Gives that right back.
   */
  void (*put_writable)(void *ctx, uint64_t mfn);
  /*
   Copies bytes from one frame to another.
   */
  void (*copy)(void *ctx,
               uint64_t source,
               uint16_t source_offset,
               uint64_t dest,
               uint16_t dest_offset,
               uint16_t len);
  /*
   Makes a mapping for processors of a domain: all of it, or nothing and negative.
   */
  int32_t (*map_host)(void *ctx, uint16_t domain, uint64_t addr, uint64_t mfn, bool readonly);
  /*
   Removes it: all of it, or nothing and negative if that frame is not mapped there.
   */
  int32_t (*unmap_host)(void *ctx, uint16_t domain, uint64_t addr, uint64_t mfn);
  /*
   Makes sure that no processor of a domain still uses a translation that was removed.
   */
  void (*flush)(void *ctx, uint16_t domain);
  /*
   A zeroed page for a domain's table, aligned to 4096 bytes; NULL: no memory.
   */
  void *(*alloc_table_page)(void *ctx, uint16_t domain);
  /*
   Takes such a page back.
   */
  void (*free_table_page)(void *ctx, void *page);
  /*
   Shows a page of its table to a domain at a guest frame number: 0 or negative.
   */
  int32_t (*place_table_page)(void *ctx, uint16_t domain, void *page, uint64_t gfn);
};

/*
 A mapping request: the public interface's layout.
 */
struct gnttab_map_item {
  /*
   Where.
   */
  uint64_t host_addr;
  /*
   `GNTMAP_*`.
   */
  uint32_t flags;
  /*
   The reference.
   */
  uint32_t gref;
  /*
   The granter.
   */
  uint16_t dom;
  /*
   Out: `GNTST_*`.
   */
  int16_t status;
  /*
   Out: the handle.
   */
  uint32_t handle;
  /*
   Out: the frame's address.
   */
  uint64_t dev_bus_addr;
};

/*
 An unmapping request: the public interface's layout.
 */
struct gnttab_unmap_item {
  /*
   Where.
   */
  uint64_t host_addr;
  /*
   The frame's address for device mappings; 0.
   */
  uint64_t dev_bus_addr;
  /*
   The handle.
   */
  uint32_t handle;
  /*
   Out: `GNTST_*`.
   */
  int16_t status;
};

/*
 One side of a copy: the public interface's layout.
 */
struct gnttab_copy_side {
  /*
   The reference, or a frame of the caller's.
   */
  uint64_t u;
  /*
   Whose table, or `DOMID_SELF`.
   */
  uint16_t domid;
  /*
   First byte.
   */
  uint16_t offset;
};

/*
 A copy: the public interface's layout.
 */
struct gnttab_copy_item {
  /*
   From where.
   */
  struct gnttab_copy_side source;
  /*
   To where.
   */
  struct gnttab_copy_side dest;
  /*
   Bytes.
   */
  uint16_t len;
  /*
   `GNTCOPY_*`.
   */
  uint16_t flags;
  /*
   Out: `GNTST_*`.
   */
  int16_t status;
};

/*
 The size of a table: the public interface's layout.
 */
struct gnttab_query_item {
  /*
   Whose.
   */
  uint16_t dom;
  /*
   Out: frames that there are.
   */
  uint32_t nr_frames;
  /*
   Out: frames that there may be.
   */
  uint32_t max_nr_frames;
  /*
   Out: `GNTST_*`.
   */
  int16_t status;
};

/*
 What the surroundings do for the driver. Every function gets `ctx` first.
 */
struct gnttab_guest_ops {
  /*
   Whatever the functions need.
   */
  void *ctx;
  /*
   Makes the hypercall `grant_table_op` with arguments laid out as x86_64 and Arm have them: what it answers.
   */
  int32_t (*hypercall)(void *ctx, uint32_t command, void *arguments, uint32_t count);
  /*
   Shows frame `index` of the table (status frames have bit 31) to this program (`add_to_physmap`): 0 or negative.
   */
  int32_t (*place)(void *ctx, uint64_t index);
  /*
   Where a frame lies that was placed: 4096 aligned bytes that stay there; NULL: it was not.
   */
  void *(*frame)(void *ctx, uint64_t index);
  /*
   Waits for so many milliseconds.
   */
  void (*sleep_ms)(void *ctx, uint32_t ms);
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 An engine over a hypervisor, for as many threads at a time as `processors` says; NULL if that is 0.

 # Safety
 `ops` points to callbacks that keep the rules of the crate; they are copied.
 */
struct gnttab_engine *gnttab_engine_new(const struct gnttab_hypervisor_ops *ops,
                                        uint32_t processors);

/*
 Ends an engine. Domains that are left lose their tables; destroy them first.

 # Safety
 Rule 1 of the crate; `engine` is used no more. NULL does nothing.
 */
void gnttab_engine_free(struct gnttab_engine *engine);

/*
 Makes an auto-translated domain (HVM or PVH): 0, -EBUSY if there is one of that number, -EINVAL for limits out of
 range, -ENOMEM. Limits of 0 are the defaults.

 # Safety
 Rule 1 of the crate.
 */
int32_t gnttab_domain_create(const struct gnttab_engine *engine,
                             uint16_t domain,
                             uint32_t grant_frames,
                             uint32_t maptrack_frames);

/*
 Ends a domain: its mappings are released. 0: gone; -EBUSY: others still use pages of it, call again when they have
 let go; -ESRCH: there is none.

 # Safety
 Rule 1 of the crate; no call of that domain is under way.
 */
int32_t gnttab_domain_destroy(const struct gnttab_engine *engine,
                              uint16_t domain);

/*
 Maps grants for a domain; each item has its status.

 # Safety
 Rules 1 and 3 of the crate.
 */
int32_t gnttab_map(const struct gnttab_engine *engine,
                   uint16_t caller,
                   struct gnttab_map_item *items,
                   uint32_t count);

/*
 Unmaps; each item has its status.

 # Safety
 Rules 1 and 3 of the crate.
 */
int32_t gnttab_unmap(const struct gnttab_engine *engine,
                     uint16_t caller,
                     struct gnttab_unmap_item *items,
                     uint32_t count);

/*
 Copies through grants; each item has its status.

 # Safety
 Rules 1 and 3 of the crate.
 */
int32_t gnttab_copy(const struct gnttab_engine *engine,
                    uint16_t caller,
                    struct gnttab_copy_item *items,
                    uint32_t count);

/*
 Asks for the size of a table.

 # Safety
 Rules 1 and 3 of the crate, for one item.
 */
int32_t gnttab_query_size(const struct gnttab_engine *engine,
                          uint16_t caller,
                          struct gnttab_query_item *item);

/*
 Chooses the version of the caller's table: 0, or what the hypercall answers.

 # Safety
 Rule 1 of the crate.
 */
int32_t gnttab_set_version(const struct gnttab_engine *engine, uint16_t caller, uint32_t version);

/*
 Makes frame `index` of the caller's table exist and shows it at `gfn` (add_to_physmap): 0 or a negative errno. Status
 frames have bit 31 of the index.

 # Safety
 Rule 1 of the crate.
 */
int32_t gnttab_place_frame(const struct gnttab_engine *engine,
                           uint16_t caller,
                           uint64_t index,
                           uint64_t gfn);

/*
 Starts a domain's driver: 0 and `*guest`, or a negative errno. `window` is where others' pages are mapped, in bytes,
 and `window_pages` how many fit; 0 for a domain that maps none.

 # Safety
 `ops` points to callbacks that keep the rules of the crate, which are copied; `guest` to room for a pointer.
 */
int32_t gnttab_guest_new(const struct gnttab_guest_ops *ops,
                         uint32_t version,
                         uint64_t window,
                         uint32_t window_pages,
                         struct gnttab_guest **guest);

/*
 Ends the driver: what it had mapped is unmapped and what it had granted is ended, where peers let go.

 # Safety
 Rule 1 of the crate; `guest` is used no more. NULL does nothing.
 */
void gnttab_guest_free(struct gnttab_guest *guest);

/*
 Grants a page with what it holds: 0 and `*gref`. The page is the driver's until [`gnttab_guest_end`] answers 0 for it.
 -ENOMEM: no reference is free; -EINVAL: no such domain, or the frame does not fit.

 # Safety
 Rule 1 of the crate; `gref` points to room for a reference.
 */
int32_t gnttab_guest_grant(const struct gnttab_guest *guest,
                           uint16_t peer,
                           uint64_t gfn,
                           bool readonly,
                           uint32_t *gref);

/*
 Ends access: 0, and the page is the caller's again; -EBUSY while the peer still has it, to be asked again; -EINVAL for
 a reference that is not granted.

 # Safety
 Rule 1 of the crate.
 */
int32_t gnttab_guest_end(const struct gnttab_guest *guest,
                         uint32_t gref);

/*
 Maps another's page: 0, `*addr` and `*handle`; or the negative status (`GNTST_*`, -1 to -13) if the hypervisor
 refused it, or a negative errno below those.

 # Safety
 Rule 1 of the crate; `addr` and `handle` point to room for their numbers.
 */
int32_t gnttab_guest_map(const struct gnttab_guest *guest,
                         uint16_t peer,
                         uint32_t gref,
                         bool readonly,
                         uint64_t *addr,
                         uint32_t *handle);

/*
 Unmaps: 0; -EINVAL for a handle that this driver does not have, -EIO if the hypervisor refused (the address is then
 never used again).

 # Safety
 Rule 1 of the crate; the page is used no more.
 */
int32_t gnttab_guest_unmap(const struct gnttab_guest *guest,
                           uint32_t handle);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* GNTTAB_H */
