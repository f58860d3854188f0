//! A XenStore for the `xenstore-*` tools, on a socket of your choice.
//!
//! ```sh
//! cargo run -p gnttab-xenstore --example xenstored -- $XDG_RUNTIME_DIR/xenstore &
//! export XENSTORED_PATH=$XDG_RUNTIME_DIR/xenstore
//! xenstore-write /tool/greeting hello
//! xenstore-ls -fp
//! ```

use gnttab_xenstore::Quotas;
use gnttab_xenstore::server::Server;
use std::error::Error;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let (Some(socket), None) = (args.next(), args.next()) else {
        eprintln!("usage: xenstored SOCKET");
        return ExitCode::from(2);
    };
    let server = Server::new(Quotas::default())
        .listen(&socket)
        .and_then(Server::spawn);
    match server {
        Ok(_server) => {
            println!("XENSTORED_PATH={}", socket.display());
            loop {
                std::thread::park();
            }
        }
        Err(error) => {
            let source = error.source().map(|source| format!(": {source}"));
            eprintln!("xenstored: {error}{}", source.unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}
