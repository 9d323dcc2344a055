//! Gives a running client of librdkafka another password. rdkafka has no call for it, and without one a
//! changed password would need a restart.

use std::ffi::CString;

use rdkafka::client::{Client, ClientContext};
use rdkafka_sys::bindings::{rd_kafka_error_destroy, rd_kafka_sasl_set_credentials};

/// Logs in as this user with this password from the next connection on, and at the next time a broker
/// asks to log in again. Returns whether the client has taken them: not if one of them has a byte of 0.
pub fn set<C: ClientContext>(client: &Client<C>, user: &str, password: &str) -> bool {
    let (Ok(user), Ok(password)) = (CString::new(user), CString::new(password)) else {
        return false;
    };
    // SAFETY: the client is borrowed, so it is alive; both texts end with a 0 and are copied by the call,
    // which takes a lock of its own and may come from any thread.
    let error = unsafe {
        rd_kafka_sasl_set_credentials(client.native_ptr(), user.as_ptr(), password.as_ptr())
    };
    if error.is_null() {
        return true;
    }
    // SAFETY: the error is the one that the call returned, and nobody else has it.
    unsafe { rd_kafka_error_destroy(error) };
    false
}
