use Priority::{Bulk, Interactive};

use super::*;

#[test]
fn bulk_cannot_take_the_reserve() {
    let pool = CapacityPool::new(10, 25);
    let bulk = pool.try_take(Bulk, 8).expect("8 are shared");
    assert!(pool.try_take(Bulk, 1).is_err());
    let interactive = pool.try_take(Interactive, 2).expect("2 are reserved");
    assert!(pool.try_take(Interactive, 1).is_err());
    assert_eq!(pool.taken(), 10);
    drop(interactive);
    drop(bulk);
    assert_eq!(pool.taken(), 0);
}

#[test]
fn interactive_calls_use_both_parts() {
    let pool = CapacityPool::new(10, 25);
    let all = pool.try_take(Interactive, 10).expect("all");
    assert!(pool.try_take(Interactive, 1).is_err());
    drop(all);
    assert!(pool.try_take(Interactive, 11).is_err());
    assert_eq!(pool.taken(), 0, "a refusal keeps nothing");
    assert!(pool.try_take(Bulk, 0).is_ok());
}

#[test]
fn a_share_splits_into_ones() {
    let pool = CapacityPool::new(10, 50);
    let mut share = pool.try_take(Interactive, 7).expect("7");
    let ones: Vec<CapacityShare> = std::iter::from_fn(|| share.split_one()).collect();
    assert_eq!(ones.len(), 7);
    drop(share);
    assert_eq!(pool.taken(), 7);
    let mut one = CapacityShare::default();
    for other in ones {
        one.merge(other);
    }
    drop(one);
    assert_eq!(pool.taken(), 0);
}

#[test]
fn a_part_of_a_share_is_given_back_alone() {
    let pool = CapacityPool::new(10, 50);
    let mut share = pool.try_take(Interactive, 7).expect("7");
    drop(share.split(4));
    assert_eq!(pool.taken(), 3);
    drop(share.split(9));
    assert_eq!(pool.taken(), 0);
    drop(share);
    assert_eq!(pool.taken(), 0);
}

#[tokio::test]
async fn bulk_that_waits_keeps_no_interactive_call_out() {
    let pool = CapacityPool::new(4, 25);
    let held = pool.try_take(Bulk, 3).expect("3 are shared");
    let waiting = {
        let pool = pool.clone();
        tokio::spawn(async move { pool.take(Bulk, 1).await })
    };
    tokio::task::yield_now().await;
    for _ in 0..100 {
        assert!(pool.try_take(Interactive, 1).is_ok());
    }
    drop(held);
    drop(waiting.await.expect("no panic"));
    assert_eq!(pool.taken(), 0);
}

#[test]
fn large_pools_do_not_overflow() {
    let size = 1 << 60;
    let pool = CapacityPool::new(size, 25);
    assert_eq!(pool.size_for(Bulk), size - size / 4);
}

const A: CallerId = CallerId(1);
const B: CallerId = CallerId(2);

fn claim(caller: CallerId, class: Priority) -> CapacityClaim {
    CapacityClaim {
        caller,
        ..class.into()
    }
}

/// Takes one by one until no more is given.
fn take_all(pool: &CapacityPool, claim: CapacityClaim) -> (Vec<CapacityShare>, NoRoom) {
    let mut shares = Vec::new();
    loop {
        match pool.try_take(claim, 1) {
            Ok(share) => shares.push(share),
            Err(reason) => return (shares, reason),
        }
    }
}

#[test]
fn a_named_caller_leaves_the_last_part_to_others() {
    let pool = CapacityPool::new(80, 0);
    let (mut of_a, reason) = take_all(&pool, claim(A, Interactive));
    assert_eq!((of_a.len(), reason), (70, NoRoom::OverShare));
    // Another one finds room at once.
    let (mut of_b, reason) = take_all(&pool, claim(B, Interactive));
    assert_eq!((of_b.len(), reason), (10, NoRoom::Full));
    // What becomes free goes to the one with less, until both have their share.
    while of_b.len() < 40 {
        of_a.pop();
        assert!(pool.try_take(claim(A, Interactive), 1).is_err());
        of_b.push(pool.try_take(claim(B, Interactive), 1).expect("it is free"));
    }
    assert_eq!(of_a.len(), 40);
    of_a.pop();
    of_a.push(pool.try_take(claim(A, Interactive), 1).expect("its share"));
    of_b.pop();
    drop((of_a, of_b));
    assert_eq!(pool.taken(), 0);
}

#[test]
fn a_caller_that_holds_nothing_may_take_whatever_is_free() {
    let pool = CapacityPool::new(80, 0);
    let mut all = pool.try_take(claim(A, Interactive), 80).expect("all");
    drop(all.split(40));
    // The same call may go on.
    let own = CapacityClaim {
        own: 40,
        ..claim(A, Interactive)
    };
    assert!(pool.try_take(own, 40).is_ok());
    let refused = pool.try_take(claim(A, Interactive), 40);
    assert_eq!(refused.map(|_| ()), Err(NoRoom::OverShare));
    assert!(pool.try_take(claim(A, Interactive), 0).is_ok());
}

#[test]
fn callers_without_names_alone_take_all() {
    let pool = CapacityPool::new(80, 25);
    let unnamed = claim(CallerId::UNNAMED, Interactive);
    let (mut of_unnamed, reason) = take_all(&pool, unnamed);
    assert_eq!((of_unnamed.len(), reason), (80, NoRoom::Full));
    // Beside a named caller the rule holds for them too.
    assert!(pool.try_take(claim(A, Interactive), 1).is_err());
    of_unnamed.truncate(75);
    let refused = pool.try_take(unnamed, 1);
    assert_eq!(refused.map(|_| ()), Err(NoRoom::OverShare));
    let (of_a, _) = take_all(&pool, claim(A, Interactive));
    assert_eq!(of_a.len(), 5);
}

#[test]
fn callers_that_have_not_asked_lately_do_not_count() {
    let pool = CapacityPool::new(80, 0);
    let unnamed = claim(CallerId::UNNAMED, Interactive);
    drop(pool.try_take(claim(A, Interactive), 1));
    let (of_unnamed, _) = take_all(&pool, unnamed);
    assert_eq!(of_unnamed.len(), 70);
    let mut state = pool.lock();
    state.asks(CallerId::UNNAMED, || {
        Instant::now() + LATELY + FORGET_INTERVAL
    });
    assert_eq!(state.holdings.len(), 1);
    drop(state);
    let (rest, _) = take_all(&pool, unnamed);
    assert_eq!(rest.len(), 10);
}

/// Line of callers that wait for one unit each; returns the order in which they
/// got it.
async fn order_of(pool: &CapacityPool, callers: &[CallerId]) -> Vec<CallerId> {
    let held = pool.try_take(Bulk, pool.size()).expect("all");
    let (sender, mut got) = tokio::sync::mpsc::channel(callers.len());
    let mut tasks = tokio::task::JoinSet::new();
    for &caller in callers {
        let (pool, sender) = (pool.clone(), sender.clone());
        tasks.spawn(async move {
            let share = pool.take(claim(caller, Bulk), 1).await;
            sender.send((caller, share)).await.expect("a receiver");
        });
        tokio::task::yield_now().await;
    }
    drop((sender, held));
    let mut order = Vec::new();
    while let Some((caller, _share)) = got.recv().await {
        order.push(caller);
    }
    order
}

#[tokio::test]
async fn callers_that_wait_take_turns() {
    let mut callers = vec![A; 20];
    callers.extend([B; 4]);
    let order = order_of(&CapacityPool::new(1, 0), &callers).await;
    let expected = [[A, B]; 4].concat();
    assert_eq!(order[..8], expected);
    assert_eq!(order.len(), 24);
}

#[tokio::test]
async fn those_that_wait_keep_others_out_and_those_that_leave_do_not() {
    let pool = CapacityPool::new(4, 0);
    let held = pool.try_take(Bulk, 3).expect("3 of 4");
    let waiting = {
        let pool = pool.clone();
        tokio::spawn(async move { pool.take(Bulk, 2).await })
    };
    tokio::task::yield_now().await;
    // What is free is for the one that waits, though it is not enough yet.
    assert!(pool.try_take(Bulk, 1).is_err());
    let behind = {
        let pool = pool.clone();
        tokio::spawn(async move { pool.take(Bulk, 1).await })
    };
    tokio::task::yield_now().await;
    waiting.abort();
    assert!(waiting.await.is_err());
    let share = behind.await.expect("it gets what the other left");
    assert_eq!(pool.taken(), 4);
    drop((share, held));
    assert_eq!(pool.taken(), 0);
    assert!(pool.lock().waiters.is_empty());
}

#[tokio::test]
async fn a_share_that_nobody_waits_for_any_more_goes_to_the_next() {
    let pool = CapacityPool::new(1, 0);
    let held = pool.try_take(Bulk, 1).expect("one");
    let mut first = Box::pin(pool.take(Bulk, 1));
    let mut second = Box::pin(pool.take(Bulk, 1));
    for waiting in [&mut first, &mut second] {
        let polled = futures_util::poll!(waiting.as_mut());
        assert!(polled.is_pending());
    }
    // The first one is given its share, and leaves before it has looked.
    drop(held);
    drop(first);
    assert_eq!(second.await.size(), 1);
    assert_eq!(pool.taken(), 0);
}

#[tokio::test]
async fn a_caller_over_its_share_waits_and_lets_others_pass() {
    let pool = CapacityPool::new(16, 0);
    let (mut of_a, _) = take_all(&pool, claim(A, Bulk));
    assert_eq!(of_a.len(), 14);
    let waiting = {
        let pool = pool.clone();
        tokio::spawn(async move { pool.take(claim(A, Bulk), 1).await })
    };
    tokio::task::yield_now().await;
    let (of_b, _) = take_all(&pool, claim(B, Bulk));
    assert_eq!(of_b.len(), 2, "A waits, but not for this part");
    of_a.truncate(8);
    assert!(!waiting.is_finished());
    of_a.truncate(7);
    drop(waiting.await.expect("within its share"));
}
