//! A virtual host to play with: boots one and runs each line of standard input in it. `plug NAME PORT` and `pull NAME` act on a stick.

use std::io::{BufRead, Write};
use std::time::Duration;

use anyhow::Result;
use vm_tests::{Host, HostConfig, UsbDevice};

fn main() -> Result<()> {
    let host = Host::boot(&HostConfig::default())?;
    let mut sticks = Vec::new();
    prompt();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        match line.split_whitespace().collect::<Vec<_>>().as_slice() {
            ["plug", name, port] => match host.plug(UsbDevice::stick(name).port(port)) {
                Ok(stick) => {
                    println!("{name}: {} bytes, SHA-256 {}", stick.size_bytes(), stick.sha256());
                    sticks.push(stick);
                }
                Err(error) => println!("{error:#}"),
            },
            ["pull", name] => {
                sticks.retain(|stick| {
                    stick.device.name() != *name
                        || host.unplug(stick).inspect_err(|error| println!("{error:#}")).is_err()
                });
            }
            _ => match host.remote().try_run(&line, Duration::from_secs(300)) {
                Ok(output) => println!("{}\n(status {})", output.transcript, output.status),
                Err(error) => println!("{error:#}"),
            },
        }
        prompt();
    }
    Ok(())
}

fn prompt() {
    print!("host# ");
    let _ = std::io::stdout().flush();
}
