//! One vCPU: the thread that serves its calls.

use std::sync::Arc;

use gnttab_abi::{
    AddToPhysmap, Command, DomId, Errno, Gfn, MEMOP_ADD_TO_PHYSMAP, PHYSMAP_SPACE_GRANT_TABLE,
    V1_ENTRIES_PER_PAGE, V2_ENTRIES_PER_PAGE,
};
use gnttab_engine::{Call, Engine, Fault, GuestMemory, Outcome, Processor, Vcpu, Version};

use super::machine::{Guest, Machine};
use crate::area::{Request, ServeError, Server};
use crate::protocol::{self, ABI, Notice, NoticeKind, REPORT_SIZE, Report};
use crate::sys::MAX_DESCRIPTORS;

/// The argument buffer, as the raw door sees guest memory: addresses are offsets into it.
struct Buffer<'a> {
    area: &'a Server,
    machine: &'a Machine,
}

impl GuestMemory for Buffer<'_> {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
        self.area.read(addr, into).map_err(|_| Fault { addr })
    }

    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), Fault> {
        self.area.write(addr, bytes).map_err(|_| Fault { addr })
    }

    fn print(&self, text: &str) {
        self.machine.print(text);
    }
}

/// Ends a domain whose vCPU can be served no more, because the monitor has met a defect of its own: a domain that waits
/// for an answer for ever is worse than one that is gone.
struct Unserved<'a>(&'a Guest);

impl Drop for Unserved<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.crash("the monitor failed to serve it");
        }
    }
}

/// Serves the calls of a vCPU until its area is closed.
pub(crate) fn serve(engine: &Arc<Engine<Machine>>, processor: usize, vcpu: &Vcpu<Machine>, area: &Server) {
    let guest = vcpu.domain().private();
    let _unserved = Unserved(guest);
    let Some(mut processor) = engine.processor(processor) else {
        // Its number was set aside for this thread.
        return guest.crash("no processor to serve a vCPU");
    };
    loop {
        match area.next() {
            Ok(request) => {
                let result = one(&mut processor, vcpu, area, &request);
                area.complete(match result {
                    Ok(value) => i64::try_from(value).unwrap_or(i64::MAX),
                    Err(errno) => errno.hypercall_result(),
                });
            }
            Err(ServeError::Closed) => return,
            Err(ServeError::Violation { .. }) => return guest.crash("wrote garbage into its hypercall area"),
        }
    }
}

/// Serves one call.
fn one(
    processor: &mut Processor<'_, Machine>,
    vcpu: &Vcpu<Machine>,
    area: &Server,
    request: &Request,
) -> Result<u64, Errno> {
    let guest = vcpu.domain().private();
    let [first, second, third, _] = request.arguments;
    match request.number {
        protocol::CALL_GRANT_TABLE => {
            let command = Command(u32::try_from(first).map_err(|_| Errno::NoSys)?);
            let count = u32::try_from(third).map_err(|_| Errno::Inval)?;
            grant_table(
                processor,
                vcpu,
                area,
                Call {
                    command,
                    addr: second,
                    count,
                },
            )
        }
        protocol::CALL_MEMORY => memory(processor, vcpu, area, first, second),
        protocol::CALL_SHARE => share(guest, first, second),
        protocol::CALL_RENEW => {
            let notice = Notice {
                kind: NoticeKind::Page,
                key: first,
            };
            guest
                .memory
                .renew(first, |page| guest.send(notice, &[page]))
                .map(u64::from)
        }
        protocol::CALL_PORT_NEW => {
            let peer = domain(first)?;
            let port = guest.ports.make(peer, |port, end| {
                guest.send(
                    Notice {
                        kind: NoticeKind::Port,
                        key: port.into(),
                    },
                    &end.descriptors(),
                )
            })?;
            Ok(port.into())
        }
        protocol::CALL_PORT_BIND => {
            let peer = processor.engine().domain(domain(first)?).ok_or(Errno::Srch)?;
            let remote = u32::try_from(second).map_err(|_| Errno::Inval)?;
            let peers = &peer.private().ports;
            let port = guest
                .ports
                .bind(guest.id, (peer.id(), peers), remote, |port, end| {
                    guest.send(
                        Notice {
                            kind: NoticeKind::Port,
                            key: port.into(),
                        },
                        &end.descriptors(),
                    )
                })?;
            Ok(port.into())
        }
        protocol::CALL_PORT_CLOSE => {
            guest
                .ports
                .close(u32::try_from(first).map_err(|_| Errno::Inval)?)?;
            Ok(0)
        }
        protocol::CALL_REPORT => {
            let mut bytes = [0; REPORT_SIZE];
            let len = usize::try_from(second).map_err(|_| Errno::TooBig)?;
            let bytes = bytes.get_mut(..len).ok_or(Errno::TooBig)?;
            area.read(first, bytes).map_err(|_| Errno::Fault)?;
            let report = Report::decode(bytes).map_err(|_| Errno::Inval)?;
            let per_frame = match vcpu.domain().version() {
                Version::V1 => V1_ENTRIES_PER_PAGE,
                Version::V2 => V2_ENTRIES_PER_PAGE,
            };
            let most = u64::from(vcpu.domain().max_grant_frames()) * u64::from(per_frame);
            guest.hear(report, most, &processor.engine().hypervisor().news);
            Ok(0)
        }
        _ => Err(Errno::NoSys),
    }
}

fn domain(number: u64) -> Result<DomId, Errno> {
    u16::try_from(number)
        .map(DomId)
        .ok()
        .filter(|id| id.is_ordinary())
        .ok_or(Errno::Inval)
}

fn grant_table(
    processor: &mut Processor<'_, Machine>,
    vcpu: &Vcpu<Machine>,
    area: &Server,
    call: Call,
) -> Result<u64, Errno> {
    let memory = Buffer {
        area,
        machine: processor.engine().hypervisor(),
    };
    // The buffer bounds every batch, so none has to stop in the middle.
    let outcome = processor.hypercall(vcpu, ABI, call, &memory, &mut || false);
    vcpu.domain().private().send_posted();
    match outcome {
        Outcome::Done(done) => done.map(|()| 0),
        Outcome::Continue(_) => Err(Errno::Again),
    }
}

/// `memory_op`: places a frame of the own grant table, and answers which table page it is.
fn memory(
    processor: &mut Processor<'_, Machine>,
    vcpu: &Vcpu<Machine>,
    area: &Server,
    command: u64,
    addr: u64,
) -> Result<u64, Errno> {
    if command != u64::from(MEMOP_ADD_TO_PHYSMAP) {
        return Err(Errno::NoSys);
    }
    let mut bytes = [0; 32];
    let bytes = bytes.get_mut(..AddToPhysmap::size(ABI)).ok_or(Errno::Fault)?;
    area.read(addr, bytes).map_err(|_| Errno::Fault)?;
    let place = AddToPhysmap::decode(ABI, bytes).map_err(|_| Errno::Fault)?;
    if place.space != PHYSMAP_SPACE_GRANT_TABLE {
        return Err(Errno::NoSys);
    }
    let gfn = Gfn(place.gpfn);
    processor.place_frame(vcpu, place.domid, place.idx, gfn)?;
    let page = vcpu.domain().private().tables.page_at(gfn).ok_or(Errno::Inval)?;
    u64::try_from(page).map_err(|_| Errno::Range)
}

/// Makes pages shareable, as many as go into one message at a time.
fn share(guest: &Guest, first: u64, count: u64) -> Result<u64, Errno> {
    if count > protocol::MAX_SHARE {
        return Err(Errno::TooBig);
    }
    let end = first.checked_add(count).ok_or(Errno::Inval)?;
    if end > first && guest.memory.mfn(Gfn(end - 1)).is_none() {
        return Err(Errno::Inval);
    }
    let mut descriptors = Vec::with_capacity(MAX_DESCRIPTORS);
    let mut at = first;
    while at < end {
        let stop = end.min(at + MAX_DESCRIPTORS as u64);
        let shared = (at..stop).try_for_each(|gfn| {
            guest.memory.share(gfn, |page| {
                descriptors.push(page.try_clone_to_owned().map_err(|_| Errno::NoMem)?);
                Ok(())
            })
        });
        // Those before one that failed are pages of their own by now: the domain must see what the monitor sees.
        let borrowed: Vec<_> = descriptors.iter().map(std::os::fd::AsFd::as_fd).collect();
        let notice = Notice {
            kind: NoticeKind::Page,
            key: at,
        };
        if !borrowed.is_empty() && guest.send(notice, &borrowed).is_err() {
            guest.crash("did not take the pages that it had made shareable");
            return Err(Errno::Again);
        }
        shared?;
        descriptors.clear();
        at = stop;
    }
    Ok(0)
}
