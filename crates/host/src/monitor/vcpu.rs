//! One vCPU: the thread that serves its calls.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use gnttab_abi::{
    AddToPhysmap, Command, DomId, Errno, Gfn, MEMOP_ADD_TO_PHYSMAP, PHYSMAP_SPACE_GRANT_TABLE,
    V1_ENTRIES_PER_PAGE, V2_ENTRIES_PER_PAGE,
};
use gnttab_engine::{Call, Engine, Fault, GuestMemory, Outcome, Processor, Vcpu, Version};
use tracing::Span;

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
                let _span = span(guest.id, &request).entered();
                let result = one(&mut processor, vcpu, area, &request);
                if let Err(errno) = &result {
                    tracing::debug!(target: "gnttab", %errno, "failed");
                }
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

/// What a call is to `tracing`: a span of the target `gnttab`, at level `TRACE`, whose name stays as it is from version to
/// version (`docs/tracing.md`). With nobody listening it costs a load and a comparison.
fn span(domain: DomId, request: &Request) -> Span {
    let [first, _, count, _] = request.arguments;
    let domain = domain.0;
    macro_rules! named {
        ($($pattern:pat => $name:literal,)*) => {
            match (request.number, first & COMMAND_MASK) {
                $($pattern => tracing::trace_span!(target: "gnttab", $name, domain, count),)*
            }
        };
    }
    named! {
        (protocol::CALL_GRANT_TABLE, 0) => "map_grant_ref",
        (protocol::CALL_GRANT_TABLE, 1) => "unmap_grant_ref",
        (protocol::CALL_GRANT_TABLE, 2) => "setup_table",
        (protocol::CALL_GRANT_TABLE, 3) => "dump_table",
        (protocol::CALL_GRANT_TABLE, 4) => "transfer",
        (protocol::CALL_GRANT_TABLE, 5) => "copy",
        (protocol::CALL_GRANT_TABLE, 6) => "query_size",
        (protocol::CALL_GRANT_TABLE, 7) => "unmap_and_replace",
        (protocol::CALL_GRANT_TABLE, 8) => "set_version",
        (protocol::CALL_GRANT_TABLE, 9) => "get_status_frames",
        (protocol::CALL_GRANT_TABLE, 10) => "get_version",
        (protocol::CALL_GRANT_TABLE, 11) => "swap_grant_ref",
        (protocol::CALL_GRANT_TABLE, 12) => "cache_flush",
        (protocol::CALL_MEMORY, _) => "memory_op",
        (protocol::CALL_SHARE, _) => "share",
        (protocol::CALL_RENEW, _) => "renew",
        (protocol::CALL_PORT_NEW, _) => "port_new",
        (protocol::CALL_PORT_BIND, _) => "port_bind",
        (protocol::CALL_PORT_CLOSE, _) => "port_close",
        (protocol::CALL_REPORT, _) => "report",
        _ => "unknown",
    }
}

/// The bits of a command that name the operation; the others say where a batch goes on.
const COMMAND_MASK: u64 = 0xfff;

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
                .renew(first, |page| send(guest, notice, &[page]))
                .map(u64::from)
        }
        protocol::CALL_PORT_NEW => {
            let peer = domain(first)?;
            let port = guest.ports.make(peer, |port, end| {
                send(guest, port_notice(port), &end.descriptors())
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
                    send(guest, port_notice(port), &end.descriptors())
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

/// Sends descriptors as a part of a call. A domain that does not take them may try the call again.
fn send(guest: &Guest, notice: Notice, descriptors: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    guest.send(notice, descriptors).map_err(|_| Errno::Again)
}

fn port_notice(port: u32) -> Notice {
    Notice {
        kind: NoticeKind::Port,
        key: port.into(),
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
        if !borrowed.is_empty()
            && let Err(error) = guest.send(notice, &borrowed)
        {
            guest.refused(error, "did not take the pages that it had made shareable");
            return Err(Errno::Again);
        }
        shared?;
        descriptors.clear();
        at = stop;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use gnttab_abi::Op;
    use tracing::span::Attributes;
    use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};

    use super::*;

    /// Names and targets of the spans that were made.
    #[derive(Clone, Default)]
    struct Names(Arc<Mutex<Vec<(&'static str, &'static str)>>>);

    impl<S: tracing::Subscriber> Layer<S> for Names {
        fn on_new_span(&self, attributes: &Attributes<'_>, _: &tracing::Id, _: Context<'_, S>) {
            let metadata = attributes.metadata();
            self.0.lock().unwrap().push((metadata.target(), metadata.name()));
        }
    }

    #[test]
    fn every_operation_has_a_span_of_its_name() {
        let names = Names::default();
        let subscriber = tracing_subscriber::registry().with(names.clone());
        tracing::subscriber::with_default(subscriber, || {
            for op in Op::ALL {
                // Opaque bits do not change the name.
                let command = u64::from(op.number()) | 5 << 12;
                let request = Request {
                    number: protocol::CALL_GRANT_TABLE,
                    arguments: [command, 0, 1, 0],
                };
                drop(span(DomId(1), &request));
            }
            let other = |number| Request {
                number,
                arguments: [77, 0, 0, 0],
            };
            drop(span(DomId(1), &other(protocol::CALL_RENEW)));
            drop(span(DomId(1), &other(protocol::CALL_GRANT_TABLE)));
        });
        let expected = Op::ALL.map(Op::name);
        let expected = expected
            .into_iter()
            .chain(["renew", "unknown"])
            .map(|name| ("gnttab", name));
        assert_eq!(*names.0.lock().unwrap(), expected.collect::<Vec<_>>());
    }
}
