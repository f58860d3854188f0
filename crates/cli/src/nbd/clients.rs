//! The server against clients that nobody here wrote.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::connection::Export;
use super::listener::{ListenError, Listener};
use super::server::{Patience, Server};
use crate::block::{BlockDevice, Completion, Geometry, Request};
use crate::file::FileDevice;
use crate::image::Image;

/// A server of a generated image of 16 MiB in a folder of its own.
struct Served {
    folder: tempfile::TempDir,
    image: Image,
    server: Server,
    uri: String,
}

impl Served {
    fn new(queues: usize) -> Self {
        Self::with_patience(queues, Patience::default())
    }

    /// One that gives clients so long.
    fn with_patience(queues: usize, patience: Patience) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = Image::generate(16 << 20).unwrap();
        let file = Arc::new(image.file().try_clone().unwrap());
        let devices: Vec<FileDevice> = (0..queues)
            .map(|_| FileDevice::new(Arc::clone(&file), image.size(), false))
            .collect();
        let export = Export {
            name: "disk".to_owned(),
            description: "a test".to_owned(),
            geometry: devices[0].geometry(),
        };
        let listener = Listener::unix(&folder.path().join("a socket")).unwrap();
        let uri = listener.to_string();
        let server = Server::start_with_patience(listener, export, devices, patience).unwrap();
        Served {
            folder,
            image,
            server,
            uri,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.image.size()).unwrap()];
        self.image.file().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

/// Whether a program is there; says so if not.
fn have(program: &str) -> bool {
    let found = Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok();
    if !found {
        eprintln!("skipped: {program} is not installed");
    }
    found
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{program} {args:?}\n{out}{err}");
    out.into_owned()
}

#[test]
fn qemu_img_finds_a_copy_identical() {
    if !have("qemu-img") {
        return;
    }
    let served = Served::new(2);
    let copy = served.path("copy");
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "raw",
            &served.uri,
            copy.to_str().unwrap(),
        ],
    );
    assert_eq!(std::fs::read(&copy).unwrap(), served.content());
    run(
        "qemu-img",
        &[
            "compare",
            "-f",
            "raw",
            "-F",
            "raw",
            &served.uri,
            copy.to_str().unwrap(),
        ],
    );
    let uri = served.uri.clone();
    served.server.stop();
    assert!(
        !served.folder.path().join("a socket").exists(),
        "{uri} is left behind"
    );
}

#[test]
fn qemu_io_reads_what_it_wrote_zeroed_and_discarded() {
    if !have("qemu-io") {
        return;
    }
    let served = Served::new(1);
    let out = run(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            "write -P 0xa5 1M 3M",
            "-c",
            "write -z 2M 64k",
            "-c",
            "write -z -u 5M 1M",
            "-c",
            "write -f -P 0x5a 512 512",
            "-c",
            "discard 8M 1M",
            "-c",
            "flush",
            "-c",
            "read -P 0xa5 1M 1M",
            "-c",
            "read -P 0 2M 64k",
            "-c",
            "read -P 0 5M 1M",
            "-c",
            "read -P 0x5a 512 512",
            &served.uri,
        ],
    );
    assert!(!out.contains("verification failed"), "{out}");
    let content = served.content();
    assert!(content[1 << 20..2 << 20].iter().all(|&byte| byte == 0xa5));
    assert!(content[512..1024].iter().all(|&byte| byte == 0x5a));
}

#[test]
fn nbdinfo_sees_what_the_disk_can_do() {
    if !have("nbdinfo") {
        return;
    }
    let served = Served::new(1);
    let info: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--json", &served.uri])).unwrap();
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], 16 << 20);
    for ability in ["can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"] {
        assert_eq!(export[ability], true, "{ability}");
    }
    assert_eq!(export["block_size_minimum"], 512);
}

#[test]
fn a_socket_in_use_or_a_file_in_the_way_is_left_alone_and_a_dead_socket_is_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let first = Listener::unix(&path).unwrap();
    assert!(matches!(Listener::unix(&path), Err(ListenError::SocketBusy(_))));
    drop(first);
    assert!(!path.exists());
    // Bound and closed without removing it: what a killed server leaves.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    drop(Listener::unix(&path).unwrap());
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(Listener::unix(&path), Err(ListenError::NotASocket(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    assert!(matches!(
        Listener::unix(&folder.path().join("n".repeat(120))),
        Err(ListenError::PathTooLong(_))
    ));
}

#[test]
fn clients_that_say_nothing_do_not_keep_others_out() {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    let patience = Patience {
        handshake: Duration::from_millis(300),
        ..Patience::default()
    };
    let served = Served::with_patience(2, patience);
    let path = served.path("a socket");
    let greeted = |client: &mut UnixStream| client.read_exact(&mut [0; 18]).is_ok();
    // One that is past its handshake may be silent for as long as it likes.
    let mut silent = UnixStream::connect(&path).unwrap();
    assert!(greeted(&mut silent));
    silent.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
    silent.read_exact(&mut [0; 10]).unwrap();
    let began = Instant::now();
    let mut mute: Vec<UnixStream> = (1..16).map(|_| UnixStream::connect(&path).unwrap()).collect();
    assert!(mute.iter_mut().all(greeted));
    // It makes no difference to begin: each of these says a byte of its flags.
    for client in &mut mute {
        client.write_all(b"\0").unwrap();
    }
    assert!(
        !greeted(&mut UnixStream::connect(&path).unwrap()),
        "16 places are taken"
    );
    for client in &mut mute {
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert!(matches!(client.read(&mut [0]), Ok(0)), "it was not hung up on");
    }
    assert!(
        began.elapsed() >= Duration::from_millis(300),
        "{:?}",
        began.elapsed()
    );
    let mut next = UnixStream::connect(&path).unwrap();
    let came_in = (0..100).any(|_| {
        greeted(&mut next) || {
            std::thread::sleep(Duration::from_millis(10));
            next = UnixStream::connect(&path).unwrap();
            false
        }
    });
    assert!(came_in, "the places are still taken");
    // A flush.
    silent
        .write_all(b"\x25\x60\x95\x13\0\0\0\x03a cookie\0\0\0\0\0\0\0\0\0\0\0\0")
        .unwrap();
    let mut reply = [0; 16];
    silent.read_exact(&mut reply).unwrap();
    assert_eq!(reply, *b"\x67\x44\x66\x98\0\0\0\0a cookie");
}

/// Sixteen that are through with their handshake and never ask for anything do not fill the export. Who has asked once may
/// be silent for as long as it likes.
#[test]
fn clients_that_ask_for_nothing_make_room() {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    let patience = Patience {
        first_request: Duration::from_millis(300),
        ..Patience::default()
    };
    let served = Served::with_patience(3, patience);
    let path = served.path("a socket");
    let connect = || {
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client.read_exact(&mut [0; 18]).ok()?;
        client.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").ok()?;
        client.read_exact(&mut [0; 10]).ok()?;
        Some(client)
    };
    let flush = |client: &mut UnixStream| {
        let asked = client.write_all(b"\x25\x60\x95\x13\0\0\0\x03a cookie\0\0\0\0\0\0\0\0\0\0\0\0");
        asked.is_ok() && client.read_exact(&mut [0; 16]).is_ok()
    };
    let mut clients: Vec<UnixStream> = (0..16).map(|_| connect().unwrap()).collect();
    assert!(clients[..4].iter_mut().all(flush));
    assert!(
        connect().is_none(),
        "16 places are taken, and nobody has been silent for long"
    );
    std::thread::sleep(Duration::from_millis(400));
    // As many as are silent come in, one for one, and those who ask keep their places.
    let mut next: Vec<UnixStream> = (0..12).map(|_| connect().expect("nobody made room")).collect();
    assert!(next.iter_mut().all(flush));
    assert!(connect().is_none(), "16 places are taken by those who ask");
    assert!(clients[..4].iter_mut().all(flush));
    for silent in &mut clients[4..] {
        assert!(matches!(silent.read(&mut [0]), Ok(0)), "it was not hung up on");
    }
    assert_eq!(served.server.counters().totals().clients, 16);
}

/// A disk whose backend sends events without end, for nothing.
struct Noisy {
    pending: std::os::fd::OwnedFd,
    looks: Arc<AtomicU32>,
}

impl BlockDevice for Noisy {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: 1 << 20,
            block_size: 512,
            preferred_size: 4096,
            read_only: true,
            flush: false,
            discard: false,
        }
    }

    fn pages(&mut self) -> impl crate::block::Pages + '_ {
        crate::block::NoPages
    }

    fn submit(&mut self, _: Request) {}

    fn kick(&mut self) {}

    fn completions(&mut self, _: &mut Vec<Completion>) -> bool {
        self.looks.fetch_add(1, Ordering::SeqCst);
        false
    }

    fn hush(&mut self) {}

    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.pending.as_fd())
    }
}

/// XSA-391: a backend that sends events as fast as it can, for nothing, does not keep its frontend busy; and clients are
/// heard meanwhile.
#[test]
fn a_flood_of_events_for_nothing_costs_a_few_looks() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let looks = Arc::new(AtomicU32::new(0));
    let noisy = Noisy {
        pending: rustix::event::eventfd(1, rustix::event::EventfdFlags::empty()).unwrap(),
        looks: Arc::clone(&looks),
    };
    let export = Export {
        name: "disk".to_owned(),
        description: "a test".to_owned(),
        geometry: noisy.geometry(),
    };
    let server = Server::start(Listener::unix(&path).unwrap(), export, vec![noisy]).unwrap();
    std::thread::sleep(Duration::from_millis(400));
    let seen = looks.load(Ordering::SeqCst);
    assert!((3..50).contains(&seen), "{seen} looks in 400 ms");
    let began = Instant::now();
    let mut client = std::os::unix::net::UnixStream::connect(&path).unwrap();
    std::io::Read::read_exact(&mut client, &mut [0; 18]).unwrap();
    assert!(
        began.elapsed() < Duration::from_millis(900),
        "greeted after {:?}",
        began.elapsed()
    );
    server.stop();
}

#[test]
fn a_client_that_is_cut_off_costs_nobody_else_anything() {
    use std::io::{Read as _, Write as _};
    let served = Served::new(1);
    let path = served.path("a socket");
    // The handshake in the old way, then a write of 512 bytes of which 3 come.
    let mut stream = b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0".to_vec();
    stream.extend(b"\x25\x60\x95\x13\0\0\0\x01a cookie\0\0\0\0\0\0\0\0\0\0\x02\0xyz");
    for cut in [1, 4, 15, 30, 48, 51] {
        let mut client = std::os::unix::net::UnixStream::connect(&path).unwrap();
        client.read_exact(&mut [0; 18]).unwrap();
        client.write_all(&stream[..cut]).unwrap();
    }
    if have("qemu-img") {
        run("qemu-img", &["info", &served.uri]);
    }
    let clients = || served.server.counters().totals().clients;
    for _ in 0..200 {
        if clients() == 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{} clients are still counted", clients());
}

/// Requests that came while too much was under way are served when that has gone, without another word of the client.
#[test]
fn what_was_asked_all_at_once_is_answered_to_the_last() {
    use std::io::{Read as _, Write as _};
    const ASKED: u64 = 512;
    const LENGTH: u32 = 64 << 10;
    let served = Served::new(1);
    let mut client = std::os::unix::net::UnixStream::connect(served.path("a socket")).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    client.read_exact(&mut [0; 18]).unwrap();
    client.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
    client.read_exact(&mut [0; 10]).unwrap();
    let mut requests = Vec::new();
    for cookie in 0..ASKED {
        requests.extend(b"\x25\x60\x95\x13\0\0\0\0");
        requests.extend(cookie.to_be_bytes());
        requests.extend((cookie % 256 * u64::from(LENGTH)).to_be_bytes());
        requests.extend(LENGTH.to_be_bytes());
    }
    client.write_all(&requests).unwrap();
    let content = served.content();
    let mut answered = std::collections::HashSet::new();
    let mut data = vec![0; LENGTH as usize];
    for _ in 0..ASKED {
        let mut head = [0; 16];
        client.read_exact(&mut head).unwrap();
        assert_eq!(head[..8], *b"\x67\x44\x66\x98\0\0\0\0");
        let cookie = u64::from_be_bytes(head[8..].try_into().unwrap());
        client.read_exact(&mut data).unwrap();
        let at = usize::try_from(cookie % 256).unwrap() * data.len();
        assert!(content[at..][..data.len()] == data, "request {cookie}");
        assert!(answered.insert(cookie), "request {cookie} is answered twice");
    }
}
