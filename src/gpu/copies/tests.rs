//! Tests over a fake driver, which is compiled from `fake.c` and which other
//! tests use too.

use std::ffi::{CString, c_char, c_long};
use std::process::Command;

use super::*;
use crate::runtime::error::EngineError;
use crate::runtime::failure::leak_if_lost;

/// Status of an illegal address, after which a context is lost.
const ILLEGAL_ADDRESS: c_int = 700;
const OUT_OF_MEMORY: c_int = 2;

/// Driver of a device whose memory is the host's; each has a state of its own.
pub(crate) struct FakeDriver {
    functions: Functions,
    count: unsafe extern "C" fn(what: *const c_char) -> c_long,
    fail: unsafe extern "C" fn(call: *const c_char, status: c_int),
    capture: unsafe extern "C" fn(on: c_int),
}

impl FakeDriver {
    pub(crate) fn new() -> Self {
        let library = compiled(&[]);
        // SAFETY: the types are those of fake.c, whose library stays loaded.
        unsafe {
            let (count, fail, capture) = (
                symbol(&library, "fake_count").unwrap(),
                symbol(&library, "fake_fail").unwrap(),
                symbol(&library, "fake_capture").unwrap(),
            );
            Self {
                functions: Functions::load(library).unwrap(),
                count,
                fail,
                capture,
            }
        }
    }

    /// Opens the device, with buffers of at most `bytes_max` bytes.
    pub(crate) fn open(&self, bytes_max: usize) -> Result<DriverCopies, String> {
        DriverCopies::new(self.functions.clone(), 0, bytes_max)
    }

    /// Returns a number that the driver counts.
    pub(crate) fn count(&self, what: &str) -> i64 {
        let what = CString::new(what).unwrap();
        // SAFETY: the text ends in a zero.
        unsafe { (self.count)(what.as_ptr()) }
    }

    /// Lets a call fail from now on; with an empty name, none.
    pub(crate) fn fail(&self, call: &str, status: c_int) {
        let call = CString::new(call).unwrap();
        // SAFETY: as above.
        unsafe { (self.fail)(call.as_ptr(), status) }
    }

    /// Begins or ends the capture of another thread.
    fn capture(&self, is_on: bool) {
        // SAFETY: takes a number.
        unsafe { (self.capture)(is_on.into()) }
    }

    fn counts<const N: usize>(&self, what: [&str; N]) -> [i64; N] {
        what.map(|what| self.count(what))
    }
}

fn compiled(defines: &[&str]) -> Library {
    let folder = tempfile::tempdir().unwrap();
    let (source, library) = (folder.path().join("a.c"), folder.path().join("a.so"));
    std::fs::write(&source, include_str!("fake.c")).unwrap();
    let mut compiler = Command::new("cc");
    let compiler = compiler.args(["-shared", "-fPIC"]).args(defines);
    let compiled = compiler.arg(&source).arg("-o").arg(&library).status();
    assert!(compiled.unwrap().success());
    // SAFETY: nothing runs when this library is loaded.
    unsafe { Library::new(&library) }.unwrap()
}

fn part(host: &mut [u8], device: &mut [u8]) -> CopyPart {
    assert_eq!(host.len(), device.len());
    CopyPart {
        host: host.as_mut_ptr(),
        device: device.as_mut_ptr().cast(),
        bytes: host.len(),
    }
}

/// Copies parts of these sizes to the device and back; returns the numbers of
/// copies and waits of both directions.
fn there_and_back(
    driver: &FakeDriver,
    copies: &mut DriverCopies,
    sizes: &[usize],
) -> [[i64; 2]; 2] {
    let mut next = 0_u8;
    let mut numbers = |size: &usize| -> Vec<u8> {
        let number = || {
            next = next.wrapping_mul(37).wrapping_add(11);
            next
        };
        std::iter::repeat_with(number).take(*size).collect()
    };
    let sent: Vec<Vec<u8>> = sizes.iter().map(&mut numbers).collect();
    let mut host = sent.clone();
    let mut device: Vec<Vec<u8>> = sizes.iter().map(|size| vec![0xee; *size]).collect();
    let mut parts = |host: &mut Vec<Vec<u8>>| -> Vec<CopyPart> {
        let pairs = host.iter_mut().zip(&mut device);
        pairs.map(|(host, device)| part(host, device)).collect()
    };
    let began = driver.counts(["uploads", "downloads", "waits"]);
    // SAFETY: all bytes belong to this function, and the device's memory is
    // the host's.
    unsafe { copies.upload(&parts(&mut host)) }.unwrap();
    let between = driver.count("waits");
    let mut back: Vec<Vec<u8>> = sizes.iter().map(|size| vec![0xdd; *size]).collect();
    // SAFETY: as above.
    unsafe { copies.download(&parts(&mut back)) }.unwrap();
    assert_eq!(device, sent);
    assert_eq!(back, sent);
    let ended = driver.counts(["uploads", "downloads", "waits"]);
    [
        [ended[0] - began[0], between - began[2]],
        [ended[1] - began[1], ended[2] - between],
    ]
}

#[test]
fn parts_are_copied_together_and_waited_for_once() {
    let driver = FakeDriver::new();
    let mut copies = driver.open(1 << 20).unwrap();
    copies.reserve(100, 100).unwrap();
    let counted = there_and_back(&driver, &mut copies, &[20, 0, 40, 40]);
    assert_eq!(counted, [[3, 1], [3, 1]]);
    // Nothing to copy is not waited for.
    let counted = there_and_back(&driver, &mut copies, &[0]);
    assert_eq!(counted, [[0, 0], [0, 0]]);
}

#[test]
fn the_fake_driver_shows_a_missing_wait() {
    let driver = FakeDriver::new();
    let mut copies = driver.open(1 << 20).unwrap();
    let (mut host, mut device) = ([7_u8; 4], [0_u8; 4]);
    let part = part(&mut host, &mut device);
    copies
        .within(|copies| {
            // SAFETY: both places live until the wait.
            let status = unsafe {
                let (to, from) = (part.device as DeviceAddress, part.host);
                (copies.functions.upload)(to, from.cast(), part.bytes, copies.stream)
            };
            copies.functions.check("upload", status)?;
            assert_eq!(device, [0; 4]);
            copies.wait()
        })
        .unwrap();
    assert_eq!(device, [7; 4]);
}

#[test]
fn larger_copies_go_in_pieces() {
    let driver = FakeDriver::new();
    let mut copies = driver.open(8).unwrap();
    copies.reserve(1000, 1000).unwrap();
    assert_eq!(driver.count("pinned"), 16, "the bound holds per direction");
    // 3 + 5, then 8, 8 and 4 + 4, then 2.
    let counted = there_and_back(&driver, &mut copies, &[3, 25, 6]);
    assert_eq!(counted, [[7, 5], [7, 5]]);
}

#[test]
fn buffers_grow_to_the_largest_copy_and_never_beyond_their_bound() {
    let driver = FakeDriver::new();
    let mut copies = driver.open(64).unwrap();
    for (up, down, pinned) in [
        (0, 0, 0),
        (4, 8, 12),
        (16, 2, 24),
        (1, 1, 24),
        (16, 50, 66),
        (70, usize::MAX, 128),
    ] {
        copies.reserve(up, down).unwrap();
        assert_eq!(driver.count("pinned"), pinned);
    }
    assert_eq!(driver.counts(["buffers", "most pinned"]), [2, 128]);
    there_and_back(&driver, &mut copies, &[100]);
}

#[test]
fn a_copy_without_a_buffer_is_refused() {
    let driver = FakeDriver::new();
    let mut copies = driver.open(64).unwrap();
    let (mut host, mut device) = ([7_u8; 4], [0_u8; 4]);
    // SAFETY: the device's memory is the host's.
    let error = unsafe { copies.upload(&[part(&mut host, &mut device)]) }.unwrap_err();
    assert_eq!(error, "no pinned memory was reserved for this copy");
    assert_eq!(driver.counts(["mode", "pushed"]), [0, 0]);
}

const OPEN: [&str; 3] = ["held", "streams", "buffers"];

#[test]
fn all_is_released_once_in_the_end() {
    let driver = FakeDriver::new();
    let mut one = driver.open(64).unwrap();
    one.reserve(8, 8).unwrap();
    let other = driver.open(64).unwrap();
    assert_eq!(driver.counts(OPEN), [2, 2, 2], "nothing is shared");
    drop(one);
    assert_eq!(driver.counts(OPEN), [1, 1, 0]);
    drop(other);
    assert_eq!(driver.counts(OPEN), [0, 0, 0]);
    assert_eq!(driver.counts(["mode", "pushed"]), [0, 0]);
}

#[test]
fn nothing_is_released_after_a_loss() {
    let driver = FakeDriver::new();
    let mut copies = driver.open(64).unwrap();
    copies.reserve(8, 8).unwrap();
    let (mut host, mut device) = ([7_u8; 4], [0_u8; 4]);
    driver.fail("cuStreamSynchronize", ILLEGAL_ADDRESS);
    // SAFETY: the device's memory is the host's.
    let error = unsafe { copies.upload(&[part(&mut host, &mut device)]) }.unwrap_err();
    let after_loss = driver.count("after loss");
    leak_if_lost(copies, &EngineError::Device(error));
    assert_eq!(driver.counts(OPEN), [1, 1, 2]);
    assert_eq!(driver.count("after loss"), after_loss, "nobody has called");
}

#[test]
fn a_lost_context_that_is_released_all_the_same_only_fails() {
    let driver = FakeDriver::new();
    let mut copies = driver.open(64).unwrap();
    copies.reserve(8, 8).unwrap();
    driver.fail("cuMemHostAlloc", ILLEGAL_ADDRESS);
    copies.reserve(9, 9).unwrap_err();
    drop(copies);
    assert!(driver.count("after loss") > 0);
}

#[test]
fn failures_have_the_drivers_words_and_leave_the_thread_as_it_was() {
    let words = |call: &str| {
        format!(
            "{call} of the NVIDIA driver failed: an illegal memory access was encountered (error \
             700)"
        )
    };
    for call in [
        "cuCtxPushCurrent",
        "cuThreadExchangeStreamCaptureMode",
        "cuMemcpyHtoDAsync",
        "cuStreamSynchronize",
    ] {
        let driver = FakeDriver::new();
        let mut copies = driver.open(64).unwrap();
        copies.reserve(8, 8).unwrap();
        let (mut host, mut device) = ([7_u8; 4], [0_u8; 4]);
        driver.fail(call, ILLEGAL_ADDRESS);
        // SAFETY: the device's memory is the host's.
        let error = unsafe { copies.upload(&[part(&mut host, &mut device)]) }.unwrap_err();
        assert_eq!(error, words(call));
        assert_eq!(driver.count("pushed"), 0, "{call}");
    }
    let driver = FakeDriver::new();
    let mut copies = driver.open(64).unwrap();
    copies.reserve(8, 8).unwrap();
    let (mut host, mut device) = ([7_u8; 4], [0_u8; 4]);
    // A failure that passes, after which copies go on.
    driver.fail("cuMemcpyDtoHAsync", 1);
    // SAFETY: as above.
    let error = unsafe { copies.download(&[part(&mut host, &mut device)]) }.unwrap_err();
    assert!(error.starts_with("cuMemcpyDtoHAsync of"), "{error}");
    assert_eq!(driver.counts(["mode", "pushed"]), [0, 0]);
    driver.fail("", 0);
    there_and_back(&driver, &mut copies, &[8]);
}

#[test]
fn what_cannot_be_opened_is_released() {
    let driver = FakeDriver::new();
    for (call, status) in [
        ("cuInit", 100),
        ("cuDeviceGet", 101),
        ("cuDevicePrimaryCtxRetain", OUT_OF_MEMORY),
        ("cuCtxPushCurrent", 1),
        ("cuStreamCreate", OUT_OF_MEMORY),
    ] {
        driver.fail(call, status);
        let error = driver.open(64).err().unwrap();
        assert!(error.starts_with(&format!("{call} of")), "{error}");
        driver.fail("", 0);
        assert_eq!(driver.counts(OPEN), [0, 0, 0], "{call}");
        assert_eq!(driver.count("pushed"), 0, "{call}");
    }
    let mut copies = driver.open(64).unwrap();
    driver.fail("cuMemHostAlloc", OUT_OF_MEMORY);
    let error = copies.reserve(8, 8).unwrap_err();
    let words = "cuMemHostAlloc of the NVIDIA driver failed: out of memory (error 2)";
    assert_eq!(error, words);
    drop(copies);
    assert_eq!(driver.counts(OPEN), [0, 0, 0]);
}

#[test]
fn copies_beside_a_capture_spoil_nothing() {
    let driver = FakeDriver::new();
    let mut copies = driver.open(64).unwrap();
    copies.reserve(8, 8).unwrap();
    driver.capture(true);
    there_and_back(&driver, &mut copies, &[8, 30]);
    assert_eq!(driver.counts(["spoiled", "mode", "pushed"]), [0, 0, 0]);
    // Memory and streams would, so they are made while nobody captures.
    copies.reserve(1, 1).unwrap();
    assert_eq!(driver.count("spoiled"), 0, "nothing had to grow");
    let error = copies.reserve(9, 9).unwrap_err();
    assert!(error.contains("when stream is capturing"), "{error}");
    driver.open(64).err().unwrap();
    assert_eq!(driver.count("spoiled"), 2);
    driver.capture(false);
}

#[test]
fn a_driver_that_lacks_a_function_is_named() {
    let error = Functions::load(compiled(&["-DWITHOUT_MODES"]))
        .err()
        .unwrap();
    let missing = "has no function cuThreadExchangeStreamCaptureMode";
    assert!(error.contains(missing), "{error}");
}
