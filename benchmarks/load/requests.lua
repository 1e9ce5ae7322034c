-- Sends the prepared requests in rotation and writes what wrk measured as JSON.
-- BENCH_REQUESTS: records of "<length>\n<bytes>"; BENCH_RESULT: where the summary goes.
local requests = {}
local file = assert(io.open(os.getenv("BENCH_REQUESTS"), "rb"))
while true do
  local length = file:read("*l")
  if not length or length == "" then break end
  requests[#requests + 1] = file:read(tonumber(length))
end
file:close()

local at = 0
function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency)
  local out = assert(io.open(os.getenv("BENCH_RESULT"), "w"))
  local errors = summary.errors
  out:write(string.format(
    '{"duration_us":%d,"requests":%d,"status":%d,"connect":%d,"read":%d,"write":%d,"timeout":%d,' ..
    '"p50_us":%d,"p90_us":%d,"p99_us":%d,"p999_us":%d,"max_us":%d}',
    summary.duration, summary.requests, errors.status, errors.connect, errors.read, errors.write,
    errors.timeout, latency:percentile(50), latency:percentile(90), latency:percentile(99),
    latency:percentile(99.9), latency.max))
  out:close()
end
