use std::sync::Arc;

use object_store::memory::InMemory;
use tokio::time::Instant;

use super::super::location::Stores;
use super::*;

/// Times that pass at once where time is paused.
const TIMES: LeaseTimes = LeaseTimes {
    renew: Duration::from_secs(10),
    gone: Duration::from_secs(45),
    look: Duration::from_secs(1),
};

const WHOLE: JobShare = JobShare::WHOLE;

/// Returns outputs of both kinds: in a store and on a disk.
fn sinks(dir: &tempfile::TempDir) -> [Sink; 2] {
    let text = dir.path().join("out");
    let disk = Sink::open(text.to_str().unwrap(), &Stores::default()).unwrap();
    [Sink::in_memory(Arc::new(InMemory::new())), disk]
}

fn share(index: u32, of: u32) -> JobShare {
    JobShare { index, of }
}

async fn names(sink: &Sink) -> Vec<String> {
    let found = sink.list(LEASES).await.unwrap();
    found.into_iter().map(|(name, _)| name).collect()
}

/// Leaves the lease of a process of another machine.
async fn leave(sink: &Sink, share: JobShare, renewals: u64) {
    let elsewhere = serde_json::json!({
        "host": "node-7",
        "pid": 42,
        "machine": "another boot",
        "started": 1,
        "id": "0123",
    });
    let note = LeaseNote {
        index: share.index,
        of: share.of,
        owner: serde_json::from_value(elsewhere).unwrap(),
        renewed: "2026-01-01T00:00:00Z".to_owned(),
        renewals,
    };
    let content = note.bytes().unwrap();
    sink.write(&file_name(share), content).await.unwrap();
}

async fn refused(sink: &Sink, share: JobShare) -> String {
    let error = ShareLease::take(sink, share, TIMES).await.unwrap_err();
    assert!(error.is::<ShareTaken>(), "{error:#}");
    error.to_string()
}

#[tokio::test(start_paused = true)]
async fn a_second_process_is_refused_at_once_until_the_first_ends() {
    let dir = tempfile::tempdir().unwrap();
    for sink in sinks(&dir) {
        let started = Instant::now();
        let lease = ShareLease::take(&sink, WHOLE, TIMES).await.unwrap();
        let told = refused(&sink, WHOLE).await;
        let pid = std::process::id();
        let words = format!("{sink}: share 0/1 is being worked on by process {pid} on ");
        assert!(told.contains(&words), "{told}");
        let early = ShareLease::check(&sink, WHOLE).await;
        assert_eq!(
            early.is_err_and(|error| error.is::<ShareTaken>()),
            sink.is_local()
        );
        assert_eq!(started.elapsed(), Duration::ZERO);
        // Renewed for minutes, it is held still.
        tokio::time::sleep(Duration::from_mins(3)).await;
        refused(&sink, WHOLE).await;
        lease.release().await;
        assert!(names(&sink).await.is_empty());
        ShareLease::check(&sink, WHOLE).await.unwrap();
        let next = ShareLease::take(&sink, WHOLE, TIMES).await.unwrap();
        next.release().await;
    }
}

#[tokio::test(start_paused = true)]
async fn shares_with_files_in_common_exclude_each_other() {
    let dir = tempfile::tempdir().unwrap();
    for sink in sinks(&dir) {
        let first = ShareLease::take(&sink, share(1, 4), TIMES).await.unwrap();
        let second = ShareLease::take(&sink, share(2, 4), TIMES).await.unwrap();
        let third = ShareLease::take(&sink, share(3, 8), TIMES).await.unwrap();
        for taken in [WHOLE, share(1, 2), share(0, 3), share(2, 8), share(3, 4)] {
            refused(&sink, taken).await;
        }
        assert_eq!(names(&sink).await.len(), 3);
        for lease in [first, second, third] {
            lease.release().await;
        }
        let whole = ShareLease::take(&sink, WHOLE, TIMES).await.unwrap();
        refused(&sink, share(2, 4)).await;
        whole.release().await;
    }
}

#[test]
fn shares_overlap_by_their_common_divisor() {
    for (one, other, expected) in [
        ((0, 1), (0, 1), true),
        ((0, 1), (5, 7), true),
        ((0, 2), (1, 2), false),
        ((0, 2), (1, 4), false),
        ((1, 2), (3, 4), true),
        ((2, 6), (0, 4), true),
        ((3, 6), (0, 4), false),
        ((1, 3), (1, 4), true),
    ] {
        let (one, other) = (share(one.0, one.1), share(other.0, other.1));
        let common = (0..120).any(|shard| one.has(shard) && other.has(shard));
        assert_eq!(common, expected, "{one:?} {other:?}");
        assert_eq!(overlap(one, other), expected, "{one:?} {other:?}");
        assert_eq!(overlap(other, one), expected, "{one:?} {other:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_owner_that_is_gone_from_this_machine_is_replaced_at_once() {
    let dir = tempfile::tempdir().unwrap();
    for sink in sinks(&dir) {
        let mut note = LeaseNote {
            index: 0,
            of: 1,
            owner: LeaseOwner::new(),
            renewed: now(),
            renewals: 3,
        };
        for renewals in 0..2 {
            note.renewals = renewals;
            let content = note.bytes().unwrap();
            sink.write(&file_name(WHOLE), content).await.unwrap();
            ShareLease::check(&sink, WHOLE).await.unwrap();
            let started = Instant::now();
            let lease = ShareLease::take(&sink, WHOLE, TIMES).await.unwrap();
            assert_eq!(started.elapsed(), Duration::ZERO);
            refused(&sink, WHOLE).await;
            lease.release().await;
        }
        assert!(names(&sink).await.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn an_owner_elsewhere_counts_as_gone_once_nothing_changes() {
    let dir = tempfile::tempdir().unwrap();
    for sink in sinks(&dir) {
        // One of the same share, and one of another number of shares.
        leave(&sink, share(0, 2), 1).await;
        leave(&sink, WHOLE, 1).await;
        let started = Instant::now();
        let lease = ShareLease::take(&sink, share(0, 2), TIMES).await.unwrap();
        assert!(started.elapsed() >= TIMES.gone);
        assert_eq!(names(&sink).await, ["00000-of-00002.json"]);
        lease.release().await;
        // A file that is no lease.
        sink.write(&file_name(WHOLE), "{".into()).await.unwrap();
        let lease = ShareLease::take(&sink, WHOLE, TIMES).await.unwrap();
        lease.release().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_owner_elsewhere_that_renews_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    for sink in sinks(&dir) {
        leave(&sink, WHOLE, 0).await;
        let owner = tokio::spawn({
            let sink = sink.clone();
            async move {
                for renewals in 1.. {
                    tokio::time::sleep(TIMES.renew).await;
                    leave(&sink, WHOLE, renewals).await;
                }
            }
        });
        let started = Instant::now();
        let told = refused(&sink, WHOLE).await;
        assert!(told.contains("process 42 on node-7"), "{told}");
        assert!(started.elapsed() <= TIMES.renew + 2 * TIMES.look);
        owner.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn an_owner_that_was_taken_for_gone_ends() {
    let dir = tempfile::tempdir().unwrap();
    for sink in sinks(&dir) {
        let mut lease = ShareLease::take(&sink, WHOLE, TIMES).await.unwrap();
        leave(&sink, WHOLE, 7).await;
        let error = lease.lost().await.to_string();
        assert!(
            error.contains("00000-of-00001.json is no longer"),
            "{error}"
        );
        // The file is another's now.
        lease.release().await;
        assert_eq!(names(&sink).await.len(), 1);
        sink.remove(&file_name(WHOLE)).await.unwrap();
        // Somebody deletes the directory.
        let mut lease = ShareLease::take(&sink, WHOLE, TIMES).await.unwrap();
        sink.remove(&file_name(WHOLE)).await.unwrap();
        lease.lost().await;
    }
}

#[tokio::test(start_paused = true)]
async fn of_many_that_take_a_lease_over_one_gets_it() {
    let dir = tempfile::tempdir().unwrap();
    for (idx, sink) in sinks(&dir).into_iter().enumerate() {
        for round in 0..4 {
            // A new lease, and one of an owner elsewhere that is gone.
            if round % 2 == 1 {
                leave(&sink, WHOLE, 1).await;
            }
            let takers = (0..8).map(|_| {
                let sink = sink.clone();
                tokio::spawn(async move { ShareLease::take(&sink, WHOLE, TIMES).await })
            });
            let mut leases = Vec::new();
            for taker in takers.collect::<Vec<_>>() {
                match taker.await.unwrap() {
                    Ok(lease) => leases.push(lease),
                    Err(error) => assert!(error.is::<ShareTaken>(), "{error:#}"),
                }
            }
            // On a disk two may write after both have compared; the one whose
            // file was replaced notices at its next renewal.
            let at_most = if idx == 0 { 1 } else { 8 };
            assert!((1..=at_most).contains(&leases.len()), "{}", leases.len());
            tokio::time::sleep(3 * TIMES.renew).await;
            let held = leases.iter_mut().filter_map(|lease| {
                let lost = futures_util::FutureExt::now_or_never(lease.lost());
                lost.is_none().then_some(())
            });
            assert_eq!(held.count(), 1);
            for lease in leases {
                lease.release().await;
            }
        }
    }
}
