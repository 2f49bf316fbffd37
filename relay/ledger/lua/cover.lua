-- ARGV: destination, the most domains, then for each domain: its name, how many recipients were served, put off, refused.
local key, most = 'smtpdup:domains:' .. ARGV[1], tonumber(ARGV[2])
local now = redis.call('TIME')[1]
for i = 3, #ARGV, 4 do
  local domain = ARGV[i]
  local was = redis.call('HGET', key, domain)
  if not was and redis.call('HLEN', key) >= most then
    domain = 'other'
    was = redis.call('HGET', key, domain)
  end
  local ok, deferred, refused = string.match(was or '', '^(%d+),(%d+),(%d+),')
  local counts = {(ok or 0) + ARGV[i + 1], (deferred or 0) + ARGV[i + 2], (refused or 0) + ARGV[i + 3]}
  redis.call('HSET', key, domain, string.format('%d,%d,%d,%d', counts[1], counts[2], counts[3], now))
end
return (#ARGV - 2) / 4
