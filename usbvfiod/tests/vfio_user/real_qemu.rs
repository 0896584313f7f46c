//! QEMU itself as the client, without a guest system: its firmware is enough.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::server::Server;

struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `QEMU` is the command with the arguments it needs to find its files, split at blanks.
fn start(server: &Server) -> Qemu {
    let line = std::env::var("QEMU").unwrap_or_else(|_| "qemu-system-x86_64".into());
    let mut words = line.split_whitespace();
    let device = format!(
        r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{}"}}}}"#,
        server.path().display()
    );
    let child = Command::new(words.next().unwrap())
        .args(words)
        .args(["-nodefaults", "-display", "none", "-accel", "tcg", "-machine", "q35,memory-backend=ram"])
        .args(["-object", "memory-backend-memfd,id=ram,size=128M,share=on", "-m", "128M"])
        .args(["-device", &device])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    Qemu(child)
}

fn wait_for(server: &Server, qemu: &mut Qemu, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !server.device().log.iter().any(|line| line.starts_with(what)) {
        assert!(Instant::now() < deadline, "no {what:?} in {:#?}", server.device().log);
        assert!(matches!(qemu.0.try_wait(), Ok(None)), "QEMU ended; {:#?}", server.device().log);
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
#[ignore = "needs QEMU 10.1 or later, named by QEMU"]
fn qemu_maps_memory_reads_config_and_boots_its_firmware() {
    let server = Server::start();
    for connection in 1..=2 {
        let mut qemu = start(&server);
        wait_for(&server, &mut qemu, "map 0x0 ");
        wait_for(&server, &mut qemu, "read Config 0x0 256");
        wait_for(&server, &mut qemu, "reset");
        wait_for(&server, &mut qemu, "read Bar(0)");
        assert_eq!(server.device().connections, connection);
        assert!(server.device().dma_read(0xf_fff0, 16).is_ok(), "RAM, and the firmware in it, is reached");
        println!("{:#?}", server.device().log);
        drop(qemu);
        server.wait_for(|device| device.memory.is_empty());
        server.device().log.clear();
    }
}
