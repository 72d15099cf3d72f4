use super::*;

fn places(max: usize, per_address_max: Option<usize>) -> ConnectionPermits {
    ConnectionPermits::new(max, per_address_max, Metrics::new().unwrap())
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Lets in a connection, which must get its place without waiting.
async fn sit(places: &ConnectionPermits) -> (ConnectionPermit, Leave) {
    let newcomer = places.enter(Some(address("10.0.0.1"))).unwrap();
    assert!(matches!(newcomer.seat, Seat::Free(_)));
    newcomer.sit().await.unwrap()
}

/// Makes a connection look as if its last call had ended a while ago.
fn rest(places: &ConnectionPermits, guest: &Guest) {
    let mut state = places.lock();
    let entry = state.guests.get_mut(&guest.id).unwrap();
    entry.since -= REST_MIN;
}

#[tokio::test]
async fn those_that_never_called_leave_first_and_then_by_their_last_call() {
    let places = places(4, None);
    let mut seated = Vec::new();
    for _ in 0..4 {
        let (place, leave) = sit(&places).await;
        place.guest.speaks();
        seated.push((place, leave));
    }
    let guest = |n: usize| seated[n].0.guest.clone();
    // The last calls ended in the order 2, 0; connection 1 is in a call, and 3
    // had none.
    drop(guest(2).call());
    drop(guest(0).call());
    let in_call = guest(1).call();
    assert_eq!(
        places.enter(None).unwrap_err(),
        NoPlace::Full,
        "all are young"
    );
    for n in 0..4 {
        rest(&places, &guest(n));
    }
    let ids: Vec<u64> = (0..4).map(|n| guest(n).id).collect();
    let mut waiting = Vec::new();
    for expected in [ids[3], ids[2], ids[0]] {
        let newcomer = places.enter(None).unwrap();
        let Seat::After { leaving, .. } = newcomer.seat else {
            panic!("there was no place");
        };
        assert_eq!(leaving, expected);
        waiting.push(newcomer);
    }
    assert_eq!(places.enter(None).unwrap_err(), NoPlace::Full);
    drop(in_call);
    for (n, (_, leave)) in seated.iter_mut().enumerate() {
        assert_eq!(leave.leave.try_recv().is_ok(), n != 1, "{n}");
        assert!(leave.cut.try_recv().is_err(), "{n}");
    }
    drop(seated);
    for newcomer in waiting {
        assert!(newcomer.sit().await.is_some());
    }
    let state = places.lock();
    assert!(state.guests.is_empty() && state.unused.is_empty() && state.rested.is_empty());
    assert!(state.addresses.is_empty());
}

#[tokio::test]
async fn those_that_only_connect_get_half_of_the_places_however_fast_they_come() {
    let places = places(4, None);
    let (used, mut used_leave) = sit(&places).await;
    drop(used.guest.call());
    let mut pending = Vec::new();
    for _ in 0..3 {
        pending.push(sit(&places).await);
    }
    // The oldest pending connection is young, but pending ones are too many; it
    // is cut at once.
    let newcomer = places.enter(None).unwrap();
    assert!(pending[0].1.cut.try_recv().is_ok());
    assert!(used_leave.leave.try_recv().is_err());
    pending.remove(0);
    assert!(newcomer.sit().await.is_some());
}

#[tokio::test(start_paused = true)]
async fn who_does_not_leave_is_cut_but_for_a_call() {
    let places = places(1, None);
    let (place, mut leave) = sit(&places).await;
    place.guest.speaks();
    let newcomer = places.enter(None).unwrap();
    let in_call = place.guest.call();
    assert!(newcomer.sit().await.is_none(), "the call has the place");
    assert!(leave.cut.try_recv().is_err());
    drop(in_call);
    rest(&places, &place.guest);
    let waiting = tokio::spawn(places.enter(None).unwrap().sit());
    (&mut leave.cut).await.unwrap();
    drop(place);
    assert!(waiting.await.unwrap().is_some());
}

#[tokio::test]
async fn an_address_counts_by_its_subscriber() {
    let places = places(10, Some(1));
    let enter = |addr: &str| places.enter(Some(address(addr)));
    let first = enter("2001:db8::1").unwrap();
    assert_eq!(enter("2001:db8::ffff:1").unwrap_err(), NoPlace::Address);
    let other = enter("2001:db8:0:1::1").unwrap();
    let v4 = enter("10.0.0.1").unwrap();
    assert_eq!(enter("::ffff:10.0.0.1").unwrap_err(), NoPlace::Address);
    assert!(enter("10.0.0.2").is_ok(), "and gone again");
    drop(first);
    assert!(enter("2001:db8::2").is_ok());
    drop((other, v4));
    assert!(places.lock().addresses.is_empty());
}

#[tokio::test]
async fn the_first_watch_of_a_connection_is_always_had() {
    let places = places(2000, None);
    let mut held = Vec::new();
    let mut n_more = 0;
    for _ in 0..1000 {
        let (place, _leave) = sit(&places).await;
        let mut watches = vec![place.guest.watch().unwrap()];
        while let Ok(watch) = place.guest.watch() {
            watches.push(watch);
            n_more += 1;
        }
        assert!(watches.len() <= WATCHES_PER_CONNECTION);
        held.push((place, watches));
    }
    assert_eq!(n_more, WATCHES_SHARED);
}
