-- ARGV: key of what this spool has brought in, then for each message: id, record, name of its file, time accepted,
-- digest, recipients (JSON), number of backups, their names. Each becomes pending for those backups, once: a share that
-- is noted as brought in, or pending or failed there, stays as it is.
local notes = ARGV[1]
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local has_twins = redis.call('EXISTS', 'smtpdup:twins') == 1
local result = {}
local i = 2
while i <= #ARGV do
  local id, record, file, accepted = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3])
  local digest, recipients, count = ARGV[i + 4], ARGV[i + 5], tonumber(ARGV[i + 6])
  i = i + 7
  local score = string.format('%.6f', (accepted > 0 and accepted < now) and accepted or now)
  local new = 0
  redis.call('ZADD', notes, 'NX', time[1], id)
  if count > 0 then redis.call('SADD', 'smtpdup:lists', unpack(ARGV, i, i + count - 1)) end
  for n = 0, count - 1 do
    local name = ARGV[i + n]
    if redis.call('ZADD', notes, 'NX', time[1], file .. ' ' .. name) == 1
      and not redis.call('ZSCORE', 'smtpdup:pending:' .. name, id)
      and not redis.call('ZSCORE', 'smtpdup:failed:' .. name, id) then
      redis.call('ZADD', 'smtpdup:pending:' .. name, score, id)
      new = new + 1
    end
  end
  if new > 0 then
    redis.call('SET', 'smtpdup:message:' .. id, record)
    redis.call('ZREM', 'smtpdup:staged', id)
    redis.call('ZREM', 'smtpdup:uncertain', id)
    redis.call('HDEL', 'smtpdup:covered', id)
    if has_twins and digest ~= '' then cover_twins(digest, recipients) end
  end
  i = i + count
  result[#result + 1] = new
end
return result
