//! `gnttab disk`: an image served from one domain to another, exported as NBD.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::args::Disk;
use crate::block::BlockDevice as _;
use crate::failure::Failure;
use crate::file::FileDevice;
use crate::image::Image;
use crate::nbd::connection::Export;
use crate::nbd::listener::{ListenError, Listener};
use crate::nbd::server::Server;
use crate::{output, place};

/// Serves the image until told to stop.
pub(crate) fn main(args: &Disk) -> Result<(), Failure> {
    let image = Image::open(&args.image, args.read_only)?;
    if let Some(format) = image.looks_like() {
        output::say(&format!(
            "gnttab disk: note: {} looks like {format}, and is served as raw bytes; convert it with: qemu-img convert",
            args.image.display()
        ));
    }
    let listener = listen(args, &image)?;
    let mut signals = Signals::new([SIGINT, SIGTERM])
        .map_err(|error| Failure::new(format!("signals: cannot be caught: {error}")))?;
    if !args.direct {
        return Err(Failure::new("disk: domains are not there yet").next("try --direct"));
    }

    let address = listener.to_string();
    let queues = args.rings.queues;
    let file = Arc::new(
        image
            .file()
            .try_clone()
            .map_err(|error| Failure::new(format!("image: {error}")))?,
    );
    let devices: Vec<FileDevice> = (0..queues)
        .map(|_| FileDevice::new(Arc::clone(&file), image.size(), image.is_read_only()))
        .collect();
    let export = Export {
        name: image.name().to_owned(),
        description: format!("{} served by gnttab, with no domains between", image.name()),
        geometry: devices[0].geometry(),
    };
    let started = Instant::now();
    let server = Server::start(listener, export, devices)
        .map_err(|error| Failure::new(format!("NBD server at {address}: {error}")))?;
    announce(args, &image, &address);
    let _ = signals.forever().next();
    let counters = Arc::clone(server.counters());
    server.stop();
    let done = json!({
        "event": "stopped",
        "seconds": started.elapsed().as_secs_f64(),
        "reads": counters.reads.load(Ordering::Relaxed),
        "writes": counters.writes.load(Ordering::Relaxed),
        "flushes": counters.flushes.load(Ordering::Relaxed),
        "discards": counters.discards.load(Ordering::Relaxed),
        "bytes_read": counters.bytes_read.load(Ordering::Relaxed),
        "bytes_written": counters.bytes_written.load(Ordering::Relaxed),
        "errors": counters.errors.load(Ordering::Relaxed),
    });
    if args.json {
        output::json("disk", done);
    }
    Ok(())
}

fn listen(args: &Disk, image: &Image) -> Result<Listener, Failure> {
    let listener = match (&args.socket, args.tcp) {
        (_, Some(port)) => Listener::tcp(port),
        (Some(path), None) => Listener::unix(path),
        (None, None) => Listener::unix(&place::folder()?.join(format!("{}.nbd", image.name()))),
    };
    listener.map_err(|error| {
        let next = match &error {
            ListenError::SocketBusy(_) | ListenError::NotASocket(_) => "choose another with: --socket PATH",
            ListenError::PathTooLong(_) => "choose a shorter one with: --socket PATH",
            ListenError::PortBusy(_) | ListenError::Port { .. } => "take any that is free with: --tcp 0",
            ListenError::Socket { .. } => "choose a place that you may write with: --socket PATH",
        };
        Failure::new(&error).next(next)
    })
}

fn announce(args: &Disk, image: &Image, address: &str) {
    if args.json {
        let size = image.size();
        let event = json!({
            "event": "serving", "address": address, "image": args.image, "size": size, "read_only": image.is_read_only(),
        });
        output::json("disk", event);
    } else {
        output::line(address);
        output::say(&format!(
            "serving {} ({}{}); stop with Ctrl-C; try: qemu-img info '{address}'",
            image.name(),
            output::bytes(image.size()),
            if image.is_read_only() { ", read-only" } else { "" },
        ));
    }
}
