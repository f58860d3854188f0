//! One client, without its socket: bytes in, requests out, completions in, bytes out.
//!
//! What must hold, whatever a client sends:
//! - nothing panics, and no length it names is allocated or looped over beyond [`Limits`];
//! - only requests that the export's [`Geometry`] allows come out of [`Connection::next_request`];
//! - every request of the client is answered once, in whatever order the disk finishes them;
//! - a client that does not read its replies is not read from either, so that it costs bounded memory;
//! - every lease that it took comes back, by [`Connection::take_returned`].
//!
//! Only simple replies are offered: structured ones pay off with block status, and blkif cannot tell which blocks hold
//! data.

use std::collections::VecDeque;
use std::sync::Arc;

use gnttab_io::shared::SharedSliceMut;

use super::wire::{self, RequestHead, Take};
use crate::block::{Completion, Data, DeviceError, Geometry, Lease, Operation, Pages, Request};

/// What is served: the same for every connection.
#[derive(Debug, Clone)]
pub(crate) struct Export {
    /// The name clients may ask for; the empty name means this export too.
    pub(crate) name: String,
    /// One line for people (`nbdinfo` shows it).
    pub(crate) description: String,
    /// The disk.
    pub(crate) geometry: Geometry,
}

/// Bounds on what one client can make us hold.
struct Limits;

impl Limits {
    /// Bytes of one read or write; also advertised.
    const PAYLOAD: u32 = 32 << 20;
    /// Requests under way.
    const IN_FLIGHT: usize = 128;
    /// Bytes of payload under way and of replies not yet sent, above which nothing more is read: about what stays in a
    /// processor's cache. One more request may come on top.
    const HELD: usize = 1 << 20;
    /// Bytes of an option's data; longer ones are skipped and refused.
    const OPTION: u32 = 16 << 10;
    /// Bytes of buffers kept for reuse.
    const SPARE: usize = 8 << 20;
    /// Bytes still to come of a payload above which they are not read by way of the input buffer.
    const STRAIGHT: usize = 16 << 10;
    /// Bytes of a write's payload from which on the next one's is expected to be read straight, too.
    const LARGE: usize = 64 << 10;
}

/// What the next bytes of the stream are.
#[derive(Debug)]
enum Phase {
    /// The client's flags, 4 bytes.
    ClientFlags,
    /// An option's head.
    Option,
    /// An option's data.
    OptionData { option: u32, length: usize },
    /// A request's head.
    Request,
    /// The data of a write.
    Payload {
        pending: Pending,
        request: Request,
        filled: usize,
    },
    /// Bytes that nobody wants; then an answer, and back to where it came from.
    Skip { left: u64, then: AfterSkip },
    /// Nothing more is read; answers still go out.
    Draining,
}

#[derive(Debug, Clone, Copy)]
enum AfterSkip {
    RefuseOption(u32),
    RefuseRequest { cookie: u64, error: u32 },
}

/// What is remembered of a request while the disk has it.
#[derive(Debug, Clone, Copy)]
struct Pending {
    cookie: u64,
    /// Bytes that the answer carries if it is a success.
    read: bool,
    bytes: usize,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Connection {
    export: Arc<Export>,
    phase: Phase,
    input: Input,
    output: Output,
    /// Leases that nobody needs any more.
    returned: Vec<Lease>,
    /// The last write was a large one: of the next request only the head is read by way of the input buffer.
    after_large: bool,
    /// The client asked to leave out the 124 zeros after `OPT_EXPORT_NAME`.
    no_zeroes: bool,
    /// By tag.
    pending: Vec<Option<Pending>>,
    in_flight: usize,
    in_flight_bytes: usize,
    spare: Vec<Vec<u8>>,
    spare_bytes: usize,
}

impl Connection {
    /// A client that has just connected; the greeting waits to be sent.
    pub(super) fn new(export: Arc<Export>) -> Self {
        let mut output = Output::default();
        let mut greeting = Vec::with_capacity(18);
        greeting.extend_from_slice(wire::NBDMAGIC);
        greeting.extend_from_slice(wire::IHAVEOPT);
        greeting.extend_from_slice(&(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES).to_be_bytes());
        output.push(greeting);
        Connection {
            export,
            phase: Phase::ClientFlags,
            input: Input::new(),
            output,
            returned: Vec::new(),
            after_large: false,
            no_zeroes: false,
            pending: Vec::new(),
            in_flight: 0,
            in_flight_bytes: 0,
            spare: Vec::new(),
            spare_bytes: 0,
        }
    }

    /// Where the client's next bytes go; `None` when nothing is to be read now. Never no room at all.
    pub(super) fn input(&mut self) -> Option<Room<'_>> {
        if self.is_choked() {
            return None;
        }
        let straight = self.is_straight();
        let bytes = match &mut self.phase {
            Phase::Draining => return None,
            Phase::Payload { request, filled, .. } if straight => match &mut request.data {
                Data::Own(data) => data.get_mut(*filled..)?,
                Data::Leased(lease) => {
                    let next = self.input.free_up_to(wire::REQUEST_SIZE);
                    return Some(Room::Leased(lease, *filled, next));
                }
            },
            Phase::Request if self.after_large => self.input.free_up_to(wire::REQUEST_SIZE),
            _ => self.input.free_up_to(Input::SIZE),
        };
        (!bytes.is_empty()).then_some(Room::Bytes(bytes))
    }

    /// `count` bytes were put where [`input`](Self::input) said.
    pub(super) fn received(&mut self, count: usize) {
        let straight = self.is_straight();
        match &mut self.phase {
            Phase::Payload { request, filled, .. } if straight => {
                let here = count.min(request.data.len() - *filled);
                *filled += here;
                self.input.filled(count - here);
            }
            _ => self.input.filled(count),
        }
    }

    /// Whether the next bytes go straight to where the disk takes them: worth it when many are to come, while few come
    /// together with the requests behind them.
    pub(super) fn is_straight(&self) -> bool {
        match &self.phase {
            Phase::Payload { request, filled, .. } => {
                let left = request.data.len().saturating_sub(*filled);
                let much = left >= Limits::STRAIGHT || request.data.len() >= Limits::LARGE;
                self.input.is_empty() && left > 0 && much
            }
            _ => false,
        }
    }

    /// The leases that are to be given back.
    pub(super) fn take_returned(&mut self) -> Vec<Lease> {
        std::mem::take(&mut self.returned)
    }

    /// The client closed its side, or something is wrong with the socket: nothing more is read, and what was not sent is
    /// dropped.
    pub(super) fn hang_up(&mut self) {
        self.drain();
        for data in self.output.clear() {
            self.recycle(data);
        }
    }

    /// Nothing more is read; answers under way still go out.
    pub(super) fn drain(&mut self) {
        if let Phase::Payload { request, .. } = std::mem::replace(&mut self.phase, Phase::Draining) {
            self.recycle(request.data);
        }
    }

    /// The handshake is not over yet.
    pub(super) fn is_negotiating(&self) -> bool {
        match &self.phase {
            Phase::ClientFlags | Phase::Option | Phase::OptionData { .. } => true,
            Phase::Skip { then, .. } => matches!(then, AfterSkip::RefuseOption(_)),
            Phase::Request | Phase::Payload { .. } | Phase::Draining => false,
        }
    }

    /// Nothing is left to do for this client.
    pub(super) fn is_finished(&self) -> bool {
        matches!(self.phase, Phase::Draining) && self.in_flight == 0 && self.output.is_empty()
    }

    /// Works through what was received up to the next request for the disk. Its tag is below
    /// [`MAX_IN_FLIGHT`](Self::MAX_IN_FLIGHT).
    pub(super) fn next_request(&mut self, pages: &mut impl Pages) -> Option<Request> {
        while !self.is_choked() {
            match self.step(pages) {
                Step::Again => {}
                Step::Starved => return None,
                Step::Request(request) => return Some(request),
            }
        }
        None
    }

    /// One more than the largest tag.
    pub(super) const MAX_IN_FLIGHT: usize = Limits::IN_FLIGHT;

    /// The disk's answer to a request that came from [`next_request`](Self::next_request).
    pub(super) fn complete(&mut self, completion: Completion) {
        let slot = usize::try_from(completion.tag)
            .ok()
            .and_then(|tag| self.pending.get_mut(tag));
        let Some(pending) = slot.and_then(Option::take) else {
            debug_assert!(
                false,
                "a completion for tag {} that is not under way",
                completion.tag
            );
            return;
        };
        self.in_flight -= 1;
        self.in_flight_bytes -= pending.bytes;
        let error = match completion.result {
            Ok(()) => 0,
            Err(DeviceError::Io) => wire::EIO,
            Err(DeviceError::Unsupported) => wire::ENOTSUP,
            Err(DeviceError::NoSpace) => wire::ENOSPC,
        };
        self.output
            .push(wire::simple_reply(error, pending.cookie).to_vec());
        if pending.read && error == 0 && completion.data.len() == pending.bytes {
            self.output.push(completion.data);
        } else if pending.read && error == 0 {
            // A disk that answers with another length has no right answer: the stream cannot go on.
            debug_assert!(
                false,
                "a read of {} bytes answered with {}",
                pending.bytes,
                completion.data.len()
            );
            self.hang_up();
        } else {
            self.recycle(completion.data);
        }
    }

    /// Requests that the disk has.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether something waits to be sent.
    pub(super) fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// What waits to be sent, oldest first, and of each the first byte that has not gone.
    pub(super) fn output(&self) -> impl Iterator<Item = (&Data, usize)> {
        self.output.waiting()
    }

    /// `count` bytes of [`output`](Self::output) were sent.
    pub(super) fn sent(&mut self, count: usize) {
        for data in self.output.sent(count) {
            self.recycle(data);
        }
    }

    /// No more work is taken on until something was finished.
    fn is_choked(&self) -> bool {
        self.in_flight >= Limits::IN_FLIGHT || self.in_flight_bytes + self.output.bytes >= Limits::HELD
    }

    fn recycle(&mut self, data: Data) {
        match data {
            Data::Leased(lease) => self.returned.push(lease),
            Data::Own(buffer) => {
                if buffer.capacity() >= 512 && self.spare_bytes + buffer.capacity() <= Limits::SPARE {
                    self.spare_bytes += buffer.capacity();
                    self.spare.push(buffer);
                }
            }
        }
    }

    /// Memory for a request's data: the disk's, or else the connection's own.
    fn buffer(&mut self, length: usize, pages: &mut impl Pages) -> Data {
        if let Some(lease) = pages.lease(length) {
            return Data::Leased(lease);
        }
        let Some(mut buffer) = self.spare.pop() else {
            return vec![0; length].into();
        };
        self.spare_bytes -= buffer.capacity();
        buffer.resize(length, 0);
        buffer.into()
    }

    fn step(&mut self, pages: &mut impl Pages) -> Step {
        match &mut self.phase {
            Phase::ClientFlags => {
                let Some(flags) = self.input.take::<4>() else {
                    return Step::Starved;
                };
                self.client_flags(u32::from_be_bytes(flags));
            }
            Phase::Option => {
                let Some(head) = self.input.take::<{ wire::OPTION_SIZE }>() else {
                    return Step::Starved;
                };
                self.option_head(&head);
            }
            &mut Phase::OptionData { option, length } => {
                let Some(data) = self.input.take_vec(length) else {
                    return Step::Starved;
                };
                self.option(option, &data);
            }
            Phase::Request => {
                let Some(head) = self.input.take::<{ wire::REQUEST_SIZE }>() else {
                    return Step::Starved;
                };
                return self.request(RequestHead::decode(&head), pages);
            }
            Phase::Payload { request, filled, .. } => {
                *filled += match &mut request.data {
                    Data::Own(data) => self.input.drain_into(data.get_mut(*filled..).unwrap_or_default()),
                    Data::Leased(lease) => self.input.drain_into_pages(&pages.parts(lease, *filled)),
                };
                if *filled < request.data.len() {
                    return Step::Starved;
                }
                let Phase::Payload { pending, request, .. } =
                    std::mem::replace(&mut self.phase, Phase::Request)
                else {
                    return Step::Again;
                };
                self.after_large = pending.bytes >= Limits::LARGE;
                return Step::Request(self.begin(pending, request));
            }
            Phase::Skip { left, then } => {
                *left -= self.input.skip(*left);
                if *left > 0 {
                    return Step::Starved;
                }
                match *then {
                    AfterSkip::RefuseOption(option) => {
                        self.phase = Phase::Option;
                        self.option_reply(option, wire::REP_ERR_TOO_BIG, b"the option's data is too long");
                    }
                    AfterSkip::RefuseRequest { cookie, error } => {
                        self.phase = Phase::Request;
                        self.refuse(cookie, error);
                    }
                }
            }
            Phase::Draining => return Step::Starved,
        }
        Step::Again
    }

    fn client_flags(&mut self, flags: u32) {
        let known = u32::from(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES);
        if flags & !known != 0 {
            return self.hang_up();
        }
        self.no_zeroes = flags & u32::from(wire::FLAG_NO_ZEROES) != 0;
        self.phase = Phase::Option;
    }

    fn option_head(&mut self, head: &[u8; wire::OPTION_SIZE]) {
        let mut take = Take(head);
        let magic = take.bytes(8);
        let (Some(magic), Some(option), Some(length)) = (magic, take.u32(), take.u32()) else {
            return;
        };
        if magic != wire::IHAVEOPT {
            return self.hang_up();
        }
        self.phase = match usize::try_from(length) {
            Ok(length_here) if length <= Limits::OPTION => Phase::OptionData {
                option,
                length: length_here,
            },
            _ => Phase::Skip {
                left: u64::from(length),
                then: AfterSkip::RefuseOption(option),
            },
        };
    }

    fn option(&mut self, option: u32, data: &[u8]) {
        self.phase = Phase::Option;
        match option {
            wire::OPT_EXPORT_NAME => self.export_name(data),
            wire::OPT_ABORT => {
                self.option_reply(option, wire::REP_ACK, &[]);
                self.phase = Phase::Draining;
            }
            wire::OPT_LIST if !data.is_empty() => {
                self.option_reply(option, wire::REP_ERR_INVALID, b"LIST takes no data");
            }
            wire::OPT_LIST => {
                let name = self.export.name.clone();
                let mut entry = Vec::with_capacity(4 + name.len());
                entry.extend_from_slice(&u32::try_from(name.len()).unwrap_or(0).to_be_bytes());
                entry.extend_from_slice(name.as_bytes());
                self.option_reply(option, wire::REP_SERVER, &entry);
                self.option_reply(option, wire::REP_ACK, &[]);
            }
            wire::OPT_INFO | wire::OPT_GO => self.info_or_go(option, data),
            _ => self.option_reply(option, wire::REP_ERR_UNSUP, b"this option is not supported"),
        }
    }

    /// The old way in: no reply that could say no, so an unknown name ends the connection.
    fn export_name(&mut self, name: &[u8]) {
        if !self.is_this_export(name) {
            return self.hang_up();
        }
        let mut reply = Vec::with_capacity(134);
        reply.extend_from_slice(&self.export.geometry.size.to_be_bytes());
        reply.extend_from_slice(&transmission_flags(&self.export.geometry).to_be_bytes());
        if !self.no_zeroes {
            reply.resize(reply.len() + 124, 0);
        }
        self.output.push(reply);
        self.phase = Phase::Request;
    }

    fn info_or_go(&mut self, option: u32, data: &[u8]) {
        let Some((name, wanted)) = parse_info(data) else {
            return self.option_reply(option, wire::REP_ERR_INVALID, b"malformed INFO or GO");
        };
        if !self.is_this_export(name) {
            return self.option_reply(option, wire::REP_ERR_UNKNOWN, b"no export of that name here");
        }
        let export = Arc::clone(&self.export);
        let geometry = &export.geometry;
        let mut info = wire::INFO_EXPORT.to_be_bytes().to_vec();
        info.extend_from_slice(&geometry.size.to_be_bytes());
        info.extend_from_slice(&transmission_flags(geometry).to_be_bytes());
        self.option_reply(option, wire::REP_INFO, &info);

        let mut info = wire::INFO_BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [geometry.block_size, geometry.preferred_size, Limits::PAYLOAD] {
            info.extend_from_slice(&size.to_be_bytes());
        }
        self.option_reply(option, wire::REP_INFO, &info);

        for (kind, text) in [
            (wire::INFO_NAME, &export.name),
            (wire::INFO_DESCRIPTION, &export.description),
        ] {
            if wanted.contains(&kind) {
                let mut info = kind.to_be_bytes().to_vec();
                info.extend_from_slice(text.as_bytes());
                self.option_reply(option, wire::REP_INFO, &info);
            }
        }
        self.option_reply(option, wire::REP_ACK, &[]);
        if option == wire::OPT_GO {
            self.phase = Phase::Request;
        }
    }

    fn is_this_export(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.export.name.as_bytes()
    }

    fn option_reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        let mut reply = Vec::with_capacity(20 + data.len());
        reply.extend_from_slice(&wire::OPTION_REPLY_MAGIC.to_be_bytes());
        reply.extend_from_slice(&option.to_be_bytes());
        reply.extend_from_slice(&kind.to_be_bytes());
        reply.extend_from_slice(&u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
        reply.extend_from_slice(data);
        self.output.push(reply);
    }

    fn request(&mut self, head: Option<RequestHead>, pages: &mut impl Pages) -> Step {
        let Some(head) = head else {
            // Out of step with the client: nothing that follows can be told apart.
            self.hang_up();
            return Step::Again;
        };
        if head.command == wire::CMD_DISC {
            self.phase = Phase::Draining;
            return Step::Again;
        }
        let operation = match judge(&head, &self.export.geometry) {
            Ok(operation) => operation,
            Err(error) => {
                if head.command == wire::CMD_WRITE {
                    let then = AfterSkip::RefuseRequest {
                        cookie: head.cookie,
                        error,
                    };
                    self.phase = Phase::Skip {
                        left: u64::from(head.length),
                        then,
                    };
                } else {
                    self.refuse(head.cookie, error);
                }
                return Step::Again;
            }
        };
        let payload = match operation {
            // `judge` held it against the limit on payloads, so it fits.
            Operation::Read | Operation::Write { .. } => usize::try_from(head.length).unwrap_or(0),
            Operation::Flush | Operation::Discard | Operation::WriteZeroes { .. } => 0,
        };
        let flush = operation == Operation::Flush;
        let request = Request {
            tag: 0,
            operation,
            offset: if flush { 0 } else { head.offset },
            length: if flush { 0 } else { head.length },
            data: if payload == 0 {
                Data::default()
            } else {
                self.buffer(payload, pages)
            },
        };
        let pending = Pending {
            cookie: head.cookie,
            read: operation == Operation::Read,
            bytes: payload,
        };
        if matches!(operation, Operation::Write { .. }) {
            self.phase = Phase::Payload {
                pending,
                request,
                filled: 0,
            };
            return Step::Again;
        }
        Step::Request(self.begin(pending, request))
    }

    /// Puts a request on the list of those under way and gives it its tag.
    fn begin(&mut self, pending: Pending, mut request: Request) -> Request {
        self.in_flight += 1;
        self.in_flight_bytes += pending.bytes;
        let free = self.pending.iter().position(Option::is_none);
        let slot = free.unwrap_or_else(|| {
            self.pending.push(None);
            self.pending.len() - 1
        });
        self.pending[slot] = Some(pending);
        request.tag = slot as u64;
        request
    }

    fn refuse(&mut self, cookie: u64, error: u32) {
        self.output.push(wire::simple_reply(error, cookie).to_vec());
    }
}

/// Where a client's bytes go.
pub(super) enum Room<'a> {
    /// Here.
    Bytes(&'a mut [u8]),
    /// To the pages of a lease, from this byte on; what comes after them, which is the next request's head, here.
    Leased(&'a Lease, usize, &'a mut [u8]),
}

/// What one step over the input came to.
enum Step {
    Again,
    /// More bytes are needed (or nothing will ever come).
    Starved,
    Request(Request),
}

fn transmission_flags(geometry: &Geometry) -> u16 {
    // Several connections are safe: every queue of a disk ends at the same medium, and a flush covers all of them.
    let mut flags = wire::TX_HAS_FLAGS | wire::TX_CAN_MULTI_CONN;
    if geometry.flush {
        flags |= wire::TX_SEND_FLUSH | wire::TX_SEND_FUA;
    }
    if geometry.read_only {
        return flags | wire::TX_READ_ONLY;
    }
    if geometry.discard {
        flags |= wire::TX_SEND_TRIM;
    }
    flags | wire::TX_SEND_WRITE_ZEROES
}

/// The name and the kinds of information asked for.
fn parse_info(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut take = Take(data);
    let length = usize::try_from(take.u32()?).ok()?;
    let name = take.bytes(length)?;
    let count = take.u16()?;
    let mut wanted = Vec::new();
    for _ in 0..count {
        wanted.push(take.u16()?);
    }
    take.is_empty().then_some((name, wanted))
}

/// What a request asks of the disk, or the error to answer it with.
fn judge(head: &RequestHead, geometry: &Geometry) -> Result<Operation, u32> {
    let fua = head.flags & wire::CMD_FLAG_FUA != 0;
    let no_hole = head.flags & wire::CMD_FLAG_NO_HOLE != 0;
    let unknown = head.flags & !(wire::CMD_FLAG_FUA | wire::CMD_FLAG_NO_HOLE);
    if unknown != 0 || (no_hole && head.command != wire::CMD_WRITE_ZEROES) || (fua && !geometry.flush) {
        return Err(wire::EINVAL);
    }
    let operation = match head.command {
        wire::CMD_READ => Operation::Read,
        wire::CMD_WRITE => Operation::Write { fua },
        wire::CMD_FLUSH if geometry.flush => return Ok(Operation::Flush),
        // What is discarded is anything afterwards, before a crash and after it: `fua` has nothing to add.
        wire::CMD_TRIM if geometry.discard || geometry.read_only => Operation::Discard,
        wire::CMD_WRITE_ZEROES => Operation::WriteZeroes { fua, no_hole },
        _ => return Err(wire::EINVAL),
    };
    let past_the_end = match operation {
        _ if geometry.read_only && operation != Operation::Read => return Err(wire::EPERM),
        Operation::Read => wire::EINVAL,
        _ => wire::ENOSPC,
    };
    let carries_data = matches!(operation, Operation::Read | Operation::Write { .. });
    let block = u64::from(geometry.block_size);
    let length = u64::from(head.length);
    if length == 0
        || (carries_data && head.length > Limits::PAYLOAD)
        || !head.offset.is_multiple_of(block)
        || !length.is_multiple_of(block)
    {
        return Err(wire::EINVAL);
    }
    match head.offset.checked_add(length) {
        Some(end) if end <= geometry.size => Ok(operation),
        _ => Err(past_the_end),
    }
}

/// Bytes received and not yet understood.
#[derive(Debug)]
struct Input {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    /// Room for the longest option, and for a good many requests at once.
    const SIZE: usize = 64 << 10;

    fn new() -> Self {
        Input {
            buffer: vec![0; Self::SIZE].into(),
            start: 0,
            end: 0,
        }
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Room until `most` bytes are there.
    fn free_up_to(&mut self, most: usize) -> &mut [u8] {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.buffer[self.end..most.max(self.end)]
    }

    fn filled(&mut self, count: usize) {
        self.end = (self.end + count).min(self.buffer.len());
    }

    fn front(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let taken = *self.front().first_chunk::<N>()?;
        self.start += N;
        Some(taken)
    }

    fn take_vec(&mut self, count: usize) -> Option<Vec<u8>> {
        let taken = self.front().get(..count)?.to_vec();
        self.start += count;
        Some(taken)
    }

    fn drain_into(&mut self, into: &mut [u8]) -> usize {
        let count = into.len().min(self.front().len());
        into[..count].copy_from_slice(&self.front()[..count]);
        self.start += count;
        count
    }

    fn drain_into_pages(&mut self, parts: &[SharedSliceMut<'_>]) -> usize {
        let mut all = 0;
        for part in parts {
            let count = part.len().min(self.front().len());
            part.first(count).copy_from(&self.front()[..count]);
            self.start += count;
            all += count;
        }
        all
    }

    fn skip(&mut self, at_most: u64) -> u64 {
        let count = self
            .front()
            .len()
            .min(usize::try_from(at_most).unwrap_or(usize::MAX));
        self.start += count;
        count as u64
    }
}

/// What is to be sent.
#[derive(Debug, Default)]
struct Output {
    queue: VecDeque<Data>,
    /// Bytes of the first that have gone.
    sent: usize,
    /// Bytes still to go.
    bytes: usize,
}

impl Output {
    fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    fn push(&mut self, data: impl Into<Data>) {
        let data = data.into();
        self.bytes += data.len();
        self.queue.push_back(data);
    }

    /// Returns what has not gone.
    fn clear(&mut self) -> VecDeque<Data> {
        std::mem::take(self).queue
    }

    fn waiting(&self) -> impl Iterator<Item = (&Data, usize)> {
        let mut skip = self.sent;
        self.queue
            .iter()
            .map(move |data| (data, std::mem::take(&mut skip)))
    }

    /// Returns what has gone whole.
    fn sent(&mut self, count: usize) -> Vec<Data> {
        self.bytes = self.bytes.saturating_sub(count);
        self.sent += count;
        let mut gone = Vec::new();
        while let Some(first) = self.queue.front()
            && self.sent >= first.len()
        {
            self.sent -= first.len();
            gone.extend(self.queue.pop_front());
        }
        gone
    }
}

#[cfg(test)]
mod tests;
