//! What the kernel's error numbers mean to the controller.

use nix::errno::Errno;

use crate::urb::{OpError, UrbStatus};

/// How a URB ended. `cancelled`: by us, or by an operation of ours.
pub(super) fn of_urb(status: Result<(), Errno>, cancelled: bool, gone: bool) -> UrbStatus {
    match status {
        Ok(()) => UrbStatus::Completed,
        Err(Errno::ENOENT | Errno::ECONNRESET) if cancelled => UrbStatus::Cancelled,
        // The kernel kills what is in flight when the device goes, with the same number as a cancel.
        Err(Errno::ENOENT) if gone => UrbStatus::Gone,
        // Killed by SETINTERFACE, RELEASEINTERFACE and the like (`devio.c destroy_async_on_interface`).
        Err(Errno::ENOENT) => UrbStatus::Cancelled,
        // `devio.c cancel_bulk_urbs` unlinks; nothing else does.
        Err(Errno::ECONNRESET) => UrbStatus::NotRun,
        Err(errno) => of_error(errno),
    }
}

/// How one isochronous packet ended. `EXDEV`: the host missed its frame.
pub(super) fn of_packet(status: Result<(), Errno>) -> UrbStatus {
    match status {
        Ok(()) => UrbStatus::Completed,
        Err(Errno::EXDEV) => UrbStatus::NotRun,
        Err(errno) => of_error(errno),
    }
}

/// Why the kernel did not take a URB, `ENOMEM` excepted.
pub(super) fn of_submit(errno: Errno) -> UrbStatus {
    match errno {
        // The flag trick: a transfer before this one failed, and the kernel keeps the endpoint closed.
        Errno::EREMOTEIO => UrbStatus::NotRun,
        errno => of_error(errno),
    }
}

fn of_error(errno: Errno) -> UrbStatus {
    match errno {
        Errno::EPIPE => UrbStatus::Stalled,
        Errno::EOVERFLOW => UrbStatus::Babble,
        Errno::ENODEV | Errno::ESHUTDOWN => UrbStatus::Gone,
        Errno::ENOSPC => UrbStatus::NoBandwidth,
        Errno::ECOMM | Errno::ENOSR => UrbStatus::DataBuffer,
        _ => UrbStatus::TransactionError,
    }
}

/// Why an operation failed.
pub(super) fn of_operation(errno: Errno) -> OpError {
    match errno {
        Errno::ENODEV | Errno::ESHUTDOWN | Errno::ENOTCONN => OpError::Gone,
        // The device has no such interface, setting, endpoint or configuration: it would stall.
        Errno::EPIPE | Errno::EINVAL | Errno::ENOENT => OpError::Stalled,
        Errno::ENOMEM | Errno::ENOSPC => OpError::NoResources,
        _ => OpError::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_cancel_the_kernels_and_an_unplug_are_told_apart() {
        let cases = [
            (Errno::ENOENT, true, false, UrbStatus::Cancelled),
            (Errno::ECONNRESET, true, false, UrbStatus::Cancelled),
            (Errno::ECONNRESET, false, false, UrbStatus::NotRun),
            (Errno::ENOENT, false, true, UrbStatus::Gone),
            (Errno::ENOENT, false, false, UrbStatus::Cancelled),
            (Errno::ESHUTDOWN, false, false, UrbStatus::Gone),
        ];
        for (errno, cancelled, gone, expected) in cases {
            assert_eq!(of_urb(Err(errno), cancelled, gone), expected, "{errno} {cancelled} {gone}");
        }
    }

    #[test]
    fn outcome_of_a_transfer_that_ended_before_its_cancel_is_its_own() {
        assert_eq!(of_urb(Ok(()), true, false), UrbStatus::Completed);
        assert_eq!(of_urb(Err(Errno::EPIPE), true, false), UrbStatus::Stalled);
    }

    #[test]
    fn bus_trouble_keeps_its_name() {
        let cases = [
            (Errno::EPIPE, UrbStatus::Stalled),
            (Errno::EOVERFLOW, UrbStatus::Babble),
            (Errno::EPROTO, UrbStatus::TransactionError),
            (Errno::EILSEQ, UrbStatus::TransactionError),
            (Errno::ETIME, UrbStatus::TransactionError),
            (Errno::ENOSR, UrbStatus::DataBuffer),
            (Errno::ENOSPC, UrbStatus::NoBandwidth),
        ];
        for (errno, expected) in cases {
            assert_eq!(of_urb(Err(errno), false, false), expected, "{errno}");
        }
    }
}
