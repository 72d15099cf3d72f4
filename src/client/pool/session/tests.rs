use super::*;

#[test]
fn rests_double_up_to_a_bound_and_are_spread() {
    for (failures, longest) in [(0, 100), (1, 200), (3, 800), (40, 10_000)] {
        let longest = Duration::from_millis(longest);
        for _ in 0..100 {
            let rest = BACKOFF.build().nth(failures).unwrap();
            assert!(rest >= longest / 2 && rest <= longest, "{rest:?}");
        }
    }
}

#[test]
fn an_images_own_fault_is_final() {
    assert!(!may_pass(GrpcCode::InvalidArgument));
    for code in [
        GrpcCode::Unavailable,
        GrpcCode::ResourceExhausted,
        GrpcCode::Internal,
    ] {
        assert!(may_pass(code), "{code}");
    }
}
