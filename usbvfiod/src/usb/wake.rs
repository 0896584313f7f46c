//! Remote wake-up: a device whose port the guest has suspended has something to say.
//!
//! The host mostly keeps the device awake (`power/control` of a device is `on` unless the operator says otherwise), so
//! it sends no wake-up signal: it waits to be asked. Hence, while the guest sleeps, we ask in its place, on the
//! endpoints on which the guest itself was waiting when it went to sleep. An answer wakes the port, and is kept for
//! the guest's next transfer on that endpoint: not one key is lost.

use crate::urb::{TransferKind, UrbRequest};

/// Longest answer that is waited for, in bytes; a guest asks for less.
const LISTEN_MAX: u32 = 64 * 1024;
/// Endpoints of one direction.
const ENDPOINTS: usize = 16;

/// SET_FEATURE (USB 2.0 §9.4.9).
const SET_FEATURE: u8 = 3;
/// CLEAR_FEATURE (USB 2.0 §9.4.1).
const CLEAR_FEATURE: u8 = 1;
/// Feature selector DEVICE_REMOTE_WAKEUP, recipient device.
const DEVICE_REMOTE_WAKEUP: u16 = 1;
/// Feature selector FUNCTION_SUSPEND, recipient interface (USB 3.2 §9.4.9).
const FUNCTION_SUSPEND: u16 = 0;
/// Bit of FUNCTION_SUSPEND's options, in the upper byte of wIndex: the function may wake the host.
const FUNCTION_WAKE: u8 = 2;

/// What came while the guest slept.
#[derive(Debug)]
struct Held {
    endpoint: u8,
    bytes: Vec<u8>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Wake {
    /// The guest has told the device that it may wake it.
    is_allowed: bool,
    /// The guest has suspended the port.
    is_suspended: bool,
    /// By number of the IN endpoint: what the guest's last transfer asked for, if the guest took it back unanswered.
    waited: [Option<UrbRequest>; ENDPOINTS],
    held: Vec<Held>,
}

impl Wake {
    /// A control transfer has succeeded.
    pub(super) fn control_done(&mut self, setup: [u8; 8]) {
        let value = u16::from_le_bytes([setup[2], setup[3]]);
        match (setup[0], setup[1], value) {
            (0x00, SET_FEATURE, DEVICE_REMOTE_WAKEUP) => self.is_allowed = true,
            (0x00, CLEAR_FEATURE, DEVICE_REMOTE_WAKEUP) | (0x01, CLEAR_FEATURE, FUNCTION_SUSPEND) => {
                self.is_allowed = false;
            }
            (0x01, SET_FEATURE, FUNCTION_SUSPEND) => self.is_allowed = setup[5] & FUNCTION_WAKE != 0,
            _ => {}
        }
    }

    /// The guest starts a transfer.
    pub(super) fn started(&mut self, endpoint: u8) {
        if let Some(place) = place(endpoint) {
            self.waited[place] = None;
        }
    }

    /// The guest takes a transfer back that the device has not answered.
    pub(super) fn taken_back(&mut self, request: &UrbRequest) {
        let waits = matches!(request.kind, TransferKind::Interrupt | TransferKind::Bulk { stream: 0 });
        if let Some(place) = place(request.endpoint).filter(|_| waits && request.len > 0) {
            let payload = crate::urb::Payload::Guest(Vec::new());
            let len = request.len.min(LISTEN_MAX);
            let (id, device, endpoint) = (request.id, request.device, request.endpoint);
            let kind = request.kind.clone();
            self.waited[place] =
                Some(UrbRequest { id, device, endpoint, kind, payload, len, follows: false });
        }
    }

    /// The port goes into U3, or comes back from it.
    pub(super) fn set_suspended(&mut self, is_suspended: bool) {
        self.is_suspended = is_suspended;
    }

    /// Whether the device may wake the guest, so that the host must not suspend it.
    pub(super) const fn is_allowed(&self) -> bool {
        self.is_allowed
    }

    /// What to ask the device for while the guest sleeps, once. Empty when it is awake, or is not to be woken.
    pub(super) fn take_listeners(&mut self) -> Vec<UrbRequest> {
        if !self.is_suspended || !self.is_allowed {
            return Vec::new();
        }
        self.waited.iter_mut().filter_map(Option::take).collect()
    }

    /// A listener brought something; true when that wakes the guest.
    pub(super) fn heard(&mut self, endpoint: u8, bytes: &[u8]) -> bool {
        if bytes.is_empty() {
            return false;
        }
        // One listener for each endpoint in each sleep; what an earlier sleep brought and nobody fetched stays first.
        if self.held.len() < 2 * ENDPOINTS {
            self.held.push(Held { endpoint, bytes: bytes.to_vec() });
        }
        self.is_suspended
    }

    /// What has come already for a transfer of the guest, at most what it asks for. The rest is for the one after.
    pub(super) fn take(&mut self, request: &UrbRequest) -> Option<Vec<u8>> {
        let position = self.held.iter().position(|held| held.endpoint == request.endpoint)?;
        let len = self.held[position].bytes.len().min(request.len as usize);
        let rest = self.held[position].bytes.split_off(len);
        let bytes = std::mem::replace(&mut self.held[position].bytes, rest);
        if self.held[position].bytes.is_empty() {
            self.held.remove(position);
        }
        Some(bytes)
    }

    /// The device begins anew: a reset also takes the right to wake the guest away (USB 2.0 §9.1.1.6).
    pub(super) fn forget(&mut self) {
        *self = Self { is_suspended: self.is_suspended, ..Self::default() };
    }

    /// A configuration, interface or endpoint begins anew.
    pub(super) fn forget_input(&mut self) {
        self.held.clear();
        self.waited = Default::default();
    }
}

fn place(endpoint: u8) -> Option<usize> {
    (endpoint & 0x80 != 0).then_some(usize::from(endpoint & 0x0f))
}

#[cfg(test)]
mod tests {
    use super::super::device::tests::{bulk, segments};
    use super::*;

    const ALLOW: [u8; 8] = [0, SET_FEATURE, 1, 0, 0, 0, 0, 0];
    const FORBID: [u8; 8] = [0, CLEAR_FEATURE, 1, 0, 0, 0, 0, 0];

    fn interrupt_in(len: u32) -> UrbRequest {
        UrbRequest { kind: TransferKind::Interrupt, ..bulk(9, 0x81, segments(&[(0, len)]), len) }
    }

    /// Asleep, with a transfer of 8 bytes taken back.
    fn asleep() -> Wake {
        let mut wake = Wake::default();
        wake.control_done(ALLOW);
        wake.taken_back(&interrupt_in(8));
        wake.set_suspended(true);
        wake
    }

    #[test]
    fn sleeping_guest_that_waited_is_listened_for() {
        let mut wake = asleep();
        let listeners = wake.take_listeners();
        assert_eq!(listeners.len(), 1);
        assert_eq!((listeners[0].endpoint, listeners[0].len), (0x81, 8));
    }

    #[test]
    fn guest_that_is_awake_or_does_not_want_to_be_woken_is_not_listened_for() {
        let mut wake = asleep();
        wake.control_done(FORBID);
        assert!(wake.take_listeners().is_empty());
        let mut wake = asleep();
        wake.set_suspended(false);
        assert!(wake.take_listeners().is_empty());
    }

    #[test]
    fn endpoints_nobody_waits_on_are_not_listened_to() {
        let mut wake = asleep();
        wake.started(0x81);
        wake.taken_back(&bulk(9, 0x02, segments(&[(0, 8)]), 8));
        wake.taken_back(&UrbRequest { kind: TransferKind::Bulk { stream: 3 }, ..interrupt_in(8) });
        wake.taken_back(&interrupt_in(0));
        assert!(wake.take_listeners().is_empty());
    }

    #[test]
    fn function_suspend_allows_and_forbids_wake_up_too() {
        let mut wake = Wake::default();
        wake.control_done([1, SET_FEATURE, 0, 0, 0, 3, 0, 0]);
        assert!(wake.is_allowed());
        wake.control_done([1, SET_FEATURE, 0, 0, 0, 1, 0, 0]);
        assert!(!wake.is_allowed());
    }

    #[test]
    fn guest_asks_for_16_mib_and_is_listened_for_with_64_kib() {
        let mut wake = asleep();
        wake.taken_back(&interrupt_in(16 << 20));
        assert_eq!(wake.take_listeners()[0].len, LISTEN_MAX);
    }

    #[test]
    fn what_was_heard_wakes_once_and_is_given_to_the_next_transfers() {
        let mut wake = asleep();
        assert!(wake.heard(0x81, &[1, 2, 3]));
        wake.set_suspended(false);
        assert!(!wake.heard(0x82, &[4]));
        assert!(!wake.heard(0x81, &[]));
        assert_eq!(wake.take(&interrupt_in(2)), Some(vec![1, 2]));
        assert_eq!(wake.take(&interrupt_in(8)), Some(vec![3]));
        assert_eq!(wake.take(&interrupt_in(8)), None);
        assert_eq!(wake.take(&UrbRequest { endpoint: 0x82, ..interrupt_in(8) }), Some(vec![4]));
    }

    #[test]
    fn nothing_grows_with_the_number_of_sleeps() {
        let mut wake = asleep();
        for _ in 0..1000 {
            wake.heard(0x81, &[0; 8]);
        }
        assert!(wake.held.len() <= 2 * ENDPOINTS);
    }

    #[test]
    fn device_that_begins_anew_has_said_nothing() {
        let mut wake = asleep();
        wake.heard(0x81, &[1]);
        wake.forget();
        assert_eq!(wake.take(&interrupt_in(8)), None);
        assert!(wake.take_listeners().is_empty() && !wake.is_allowed());
    }
}
